"""Parameter-efficient fine-tuning methods and adapter folders."""
