"""Text data: calibration sources, task examples, tasks of lm-evaluation-harness, and the built-in data."""
