"""Compute the method's equations on tensors; arXiv 2408.01960."""
