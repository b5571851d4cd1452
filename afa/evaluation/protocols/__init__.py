"""What every method is asked to do, the same for all. Importing this package costs nothing."""
