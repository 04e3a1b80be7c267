"""HTTP connections of the front."""
