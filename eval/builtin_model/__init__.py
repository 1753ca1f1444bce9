"""Train the embedded model and write its texts: `cd eval && python -m builtin_model.train --output DIR`."""
