"""Forward and backward pass of an optimizer step: loss, micro-batches, pipeline."""
