"""gRPC connections of the front."""
