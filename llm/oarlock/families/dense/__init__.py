"""Families of our own decoder in which every token passes through all weights."""
