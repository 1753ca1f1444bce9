"""Text: calibration sources, task examples, harness tasks, and the embedded data."""
