"""The embedded default: real text and instructions that every machine with Python has, no download."""
