"""Out of the house: directories that other programs read, each proven."""
