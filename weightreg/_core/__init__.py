"""What every method asks: which leaves are weights, what users pass, norms, meshes."""
