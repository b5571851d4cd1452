"""One file a family of models: its stages, how it is called, its drop-in denoiser. See registry.py."""
