"""A run as its user asks for it: prune, discover, compare, ablate, evaluate."""
