"""Building, loading, running and resizing models."""
