"""Families of our own decoder with a mixture of experts."""
