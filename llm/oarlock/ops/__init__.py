"""Fused operators (built from custom_ops/) behind Paddle's and PaddleNLP's names, and their reference versions."""
