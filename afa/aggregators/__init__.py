"""How to fuse one stage. The registry is in registry.py; importing this package costs nothing."""
