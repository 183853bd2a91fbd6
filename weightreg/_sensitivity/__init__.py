"""How much a network's outputs change with its input."""
