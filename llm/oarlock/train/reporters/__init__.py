"""Where metrics of a run are reported."""
