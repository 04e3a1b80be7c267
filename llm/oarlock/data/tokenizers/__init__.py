"""Tokenizers: loading, checking and identifying them."""
