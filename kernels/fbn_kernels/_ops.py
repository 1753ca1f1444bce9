"""Name the package's torch operators.

The Hugging Face kernel builder replaces this file with one whose namespace is unique to the build, so that two
versions of the package can be loaded in one process.
"""

from __future__ import annotations


def add_op_namespace_prefix(op_name: str) -> str:
    """Return `op_name` with the package's operator namespace before it."""
    return f"fbn_kernels::{op_name}"
