"""Evaluators: each returns rows of (metric, value, n)."""
