"""Checkpoints: a complete, checksummed folder, or nothing; layout.py shows it."""
