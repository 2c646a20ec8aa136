"""latent_ddpm: train latent diffusion models from scratch, on anybody's images.

Data flows one way: config -> data -> models -> losses -> loop -> checkpoint -> export.
The loops themselves are the two scripts beside this package, train_autoencoder.py and train_unet.py.
"""

__version__ = "0.1.0"
