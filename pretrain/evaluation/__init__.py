"""Evaluators: rows of one table (evaluators.py), of a model under test (subject.py) on data sets."""
