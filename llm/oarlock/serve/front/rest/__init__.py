"""KServe's REST routes."""
