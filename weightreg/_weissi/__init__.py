"""WEISSI: a penalty that shifting scale between layers cannot lower."""
