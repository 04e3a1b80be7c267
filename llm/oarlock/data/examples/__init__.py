"""Tokenized fine-tuning examples: labels, packing, batches, cache."""
