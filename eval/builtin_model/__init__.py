"""How the embedded model and its texts were made: `cd eval && python -m builtin_model.train --output DIR`."""
