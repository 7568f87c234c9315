"""The equations, on tensors; arXiv 2408.01960."""
