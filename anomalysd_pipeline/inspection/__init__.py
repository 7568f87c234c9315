"""Run the command `detect`."""
