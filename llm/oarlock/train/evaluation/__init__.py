"""Evaluation: loss, generated answers, metrics, and the best checkpoint."""
