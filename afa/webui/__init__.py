"""The web page: what `afa ui` serves. Importing this package costs nothing."""
