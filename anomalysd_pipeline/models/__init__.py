"""Networks and stores with weights."""
