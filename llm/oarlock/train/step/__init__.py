"""Forward and backward of an optimizer step: loss, micro-batches, pipeline."""
