"""latent_ddpm: train latent diffusion models from scratch, on anybody's images.

Packages, from the bottom up: training (what both loops share), autoencoder (stage 1), data (images, captions, latents),
diffusion (stage 2), evaluation, publishing. Imports go only downwards. The training loops are the two scripts beside
this package, train_autoencoder.py and train_unet.py.
"""

__version__ = "0.1.0"
