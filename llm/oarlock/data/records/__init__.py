"""Fine-tuning records: where they are found and how they become conversations."""
