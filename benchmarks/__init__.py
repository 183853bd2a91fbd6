"""Experiments on real data, with the public names of weightreg only."""
