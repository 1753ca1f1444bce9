"""What a run found and did, as one page to look at."""
