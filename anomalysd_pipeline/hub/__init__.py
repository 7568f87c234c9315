"""Publish checkpoints on the Hugging Face Hub."""
