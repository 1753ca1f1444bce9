"""Short healing of a cut model against the dense one it was cut from."""
