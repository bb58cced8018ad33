"""latentkit: a complete latent diffusion system. Nothing heavy is imported until it is used."""

__version__ = "0.1.0"
