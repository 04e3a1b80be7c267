"""The parts of a Triton model repository that export and server share: templates, inputs, configurations."""
