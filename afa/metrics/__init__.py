"""How pictures are judged."""
