"""Floor 0: the mathematics of diffusion on tensors, in the one working space x = x0 + sigma * eps."""
