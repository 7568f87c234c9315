"""Files, console, devices and drawing: knows nothing of the method."""
