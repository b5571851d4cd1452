"""Is this set of experts worth ensembling, and which of them? Asked before any training. Importing this package costs nothing."""
