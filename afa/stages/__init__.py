"""How a denoiser is read: as a flat list of stages."""
