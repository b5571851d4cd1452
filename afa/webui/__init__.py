"""The web page that `afa ui` serves. Importing this package loads no other module."""
