"""The app: its page, sessions and files. `app.py` at the root of the repository starts it."""
