"""Evaluation of pruned checkpoints beside their dense originals, with lm-evaluation-harness."""
