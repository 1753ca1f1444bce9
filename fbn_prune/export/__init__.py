"""The pruned model as a folder that stock loaders open."""
