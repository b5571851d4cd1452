"""How good is it, and how sure are we? Importing this package costs nothing."""
