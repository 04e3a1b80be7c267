"""Fused operators (built from custom_ops/), and their reference versions."""
