"""Training: runs, trainer, checkpoints, evaluation, reporters, rehearsal."""
