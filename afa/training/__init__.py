"""Train the aggregators of an ensemble. Importing this package costs nothing."""
