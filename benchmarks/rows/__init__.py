"""The rows of serving's reliability plan that need a server in a process of its own; see `serving_rows.py`."""
