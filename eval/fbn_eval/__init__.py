"""Evaluation of pruned checkpoints beside their dense originals."""
