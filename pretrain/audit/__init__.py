"""The audit of a run: recomputes everything that the run's folder says about the samples seen. Read-only."""
