"""Models and files from hubs."""
