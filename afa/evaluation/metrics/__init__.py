"""How pictures are judged, one file a metric. Importing this package costs nothing."""
