"""What is trained: families, building and loading."""
