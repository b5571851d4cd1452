"""Where experts come from: parsed, located, compared, loaded, hashed. Importing this package costs nothing."""
