"""A screening as text and as a page. Importing this package costs nothing."""
