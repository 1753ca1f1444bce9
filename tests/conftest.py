"""Before any test imports torch."""

from __future__ import annotations

import os

# Two workers share two cores: threads that spin while they wait take them from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
