"""Rehearsal of a parallel plan on CPU ranks."""
