"""What a model is trained on: corpora, records, templates, labels, and the embedded default."""
