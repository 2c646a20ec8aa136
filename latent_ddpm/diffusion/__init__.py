"""Stage 2: U-Net, noise schedule, objective, conditioning, weight averages and sampling."""
