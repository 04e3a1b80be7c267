"""The output folder of a run: its lock and its records."""
