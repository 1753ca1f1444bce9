"""The command line: one module per command. It calls :mod:`fbn_prune.api` and is the only part that prints."""
