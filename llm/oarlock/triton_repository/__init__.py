"""The files of a Triton model repository that both export and server know."""
