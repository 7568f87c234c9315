"""How the embedded checkpoint is trained, from nothing: see README.md in this folder for the order and the
commands."""
