"""Short training of a cut model towards the dense model from which it was cut."""
