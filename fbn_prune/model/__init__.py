"""Models as the rest of the package sees them: where the MLPs are, how they are read, how they are cut."""
