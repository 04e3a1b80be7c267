"""The front of the server: the one process that speaks with clients. Does not import paddle."""
