"""Hold networks and stores with weights."""
