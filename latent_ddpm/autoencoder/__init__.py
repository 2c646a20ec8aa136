"""Stage 1: the VQ-VAE or KL-VAE, its quantizers, losses and discriminator, and its export to diffusers."""
