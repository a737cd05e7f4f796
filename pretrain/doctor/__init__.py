"""A machine, or all nodes of a job, before a run is queued: what would stop it or slow it down, with the remedy."""
