"""auto_mbw: block weights found by score instead of taste. Importing this package costs nothing."""
