"""The denoiser of an ensemble: the loop over stages, hooks, placement, noise schedules and LoRAs."""
