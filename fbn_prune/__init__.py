"""fbn-prune: find the functional networks of a causal language model, keep the key ones, write a smaller checkpoint.

Data flows one way: data -> model -> networks -> pruning -> export; :mod:`fbn_prune.runs` puts it together.
"""
