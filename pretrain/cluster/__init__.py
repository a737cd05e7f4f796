"""The ranks of a run on one machine or many: agreement, signals, starting and stopping them."""
