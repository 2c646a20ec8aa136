"""Stage 2: the U-Net, the noise schedule and objective, conditioning, weight averages and sampling."""
