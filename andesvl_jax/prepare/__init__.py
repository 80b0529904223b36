"""Real models and real data from package registries, checked against the bytes they are known by."""
