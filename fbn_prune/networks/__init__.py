"""Functional networks: found by spatial ICA, kept as one artifact, ranked, switched on and off."""
