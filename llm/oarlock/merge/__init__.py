"""Merging LoRA adapters into their base model."""
