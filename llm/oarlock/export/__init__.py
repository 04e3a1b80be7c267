"""Write model folders that other programs read, each proven equal to its source."""
