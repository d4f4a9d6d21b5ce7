"""Claims about nearest-neighbour search."""
