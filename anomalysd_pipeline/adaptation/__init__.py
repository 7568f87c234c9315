"""Fine-tuning on a few normal pictures."""
