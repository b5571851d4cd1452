"""A small, genuine world to see and test everything on. Importing this package costs nothing."""
