"""The networks: autoencoder, quantizers, discriminator, U-Net."""
