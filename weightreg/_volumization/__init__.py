"""Volumization: weights outside a box are pulled to its wall after each step."""
