"""Models as the rest of the package sees them: where the MLPs are, how to read and cut them."""
