"""Trained controls: what the same data, parameters and compute do to a single model. Importing this package costs nothing."""
