"""The evaluation sets of the papers: one row each in table.py, how they are prepared, what was published."""
