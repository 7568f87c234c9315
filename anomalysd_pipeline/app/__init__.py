"""The app: what its page rests on and the page itself. `app.py` at the root of the repository starts it."""
