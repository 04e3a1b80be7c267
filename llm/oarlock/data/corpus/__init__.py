"""Pretraining corpora: building, reading, blending and ordering them."""
