"""Measures the source tree: sizes, imports, functions, words and reading distance (`scripts/code_figures.py`)."""
