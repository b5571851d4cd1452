"""A small, real world of experts for demonstrations and tests. Importing this package is cheap."""
