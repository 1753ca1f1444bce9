"""Models: where an architecture's MLPs are, how to read a checkpoint, run a model layer by layer and cut it."""
