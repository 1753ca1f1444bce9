"""Functional networks: found by spatial ICA, stored in one file, ranked, and switched on and off."""
