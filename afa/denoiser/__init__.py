"""The walk by stages, and the drop-in denoiser of each family. Importing this package costs nothing."""
