"""Equivalent norms: networks run on weights mapped to one norm."""
