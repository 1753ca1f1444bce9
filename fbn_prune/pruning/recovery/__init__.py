"""Short training of a cut model towards the dense model from which it was cut."""

from typing import Literal

Weights = Literal["adapters", "all"]
"""What the distillation trains: low-rank adapters, or all weights of the linear maps."""
