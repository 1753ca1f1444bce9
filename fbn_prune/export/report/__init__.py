"""Draw a run's networks and results as one HTML page."""
