"""Families that run in PaddleNLP's models."""
