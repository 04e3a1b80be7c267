"""The Triton server and its models."""
