"""Attacks on inputs, and losses for wrong labels and robust features."""
