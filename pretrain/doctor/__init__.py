"""Checks a machine, or all nodes of a job, before a run: what would stop it or slow it down, with the remedy."""
