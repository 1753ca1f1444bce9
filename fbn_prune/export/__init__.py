"""Write pruned models as folders that standard loaders open, and reports, GGUF files and Hub repositories of them."""
