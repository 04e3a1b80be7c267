"""Optimizer, gradient clipping, learning rate and random numbers of a step."""
