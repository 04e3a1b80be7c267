"""Reporters of a run: console, metrics.jsonl, samples.jsonl, VisualDL."""
