"""Help with files, the console, devices and drawing; know nothing of the method."""
