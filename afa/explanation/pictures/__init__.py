"""An explanation as pictures: for readers, not for debugging."""
