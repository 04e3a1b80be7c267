"""Checkpoints: writing, choosing, reading and inspecting them."""
