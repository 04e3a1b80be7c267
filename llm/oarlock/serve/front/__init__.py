"""The front of the server: the only process that talks to clients. Does not import paddle."""
