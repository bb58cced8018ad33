"""Floor 2: one latent diffusion model as a thing: first stage, conditioners, denoiser."""
