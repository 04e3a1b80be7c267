"""Evaluation: held-out loss, generated answers, metrics, and the best checkpoint."""
