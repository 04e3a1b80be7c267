"""The processes of a server: start, restart, administration."""
