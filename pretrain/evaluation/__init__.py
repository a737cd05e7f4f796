"""Evaluation of a model (subject.py) on data sets; the evaluators are rows of one table (evaluators.py)."""
