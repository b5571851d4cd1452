"""Prompts in, pictures out, image by image. Importing this package costs nothing."""
