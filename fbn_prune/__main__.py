"""`python -m fbn_prune` is `fbn-prune`."""

from fbn_prune.cli.main import main

main()
