"""From image files to batches of tensors and cached latents."""
