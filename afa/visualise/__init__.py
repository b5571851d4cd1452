"""Pictures about pictures: weight maps over images, grids. Importing this package costs nothing."""
