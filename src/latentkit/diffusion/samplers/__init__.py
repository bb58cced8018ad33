"""Samplers: pure functions from a denoiser and sigmas to an iterator of steps."""
