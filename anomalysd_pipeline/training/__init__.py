"""Run the command `train`."""
