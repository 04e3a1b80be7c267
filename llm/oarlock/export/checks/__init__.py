"""Checks of exported folders."""
