"""The run: trainer, loss, meters, callbacks, checkpoints."""
