"""A training run: run.py is its table of contents, loop.py its loop."""
