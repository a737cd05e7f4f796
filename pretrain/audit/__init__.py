"""The audit of a run: everything that its folder says of the samples seen, added up again. Reads only."""
