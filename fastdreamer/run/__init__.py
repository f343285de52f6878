"""One run: its loop, what it keeps, what it shows."""
