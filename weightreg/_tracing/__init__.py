"""Reads what a network does with its parameters from what it computes."""
