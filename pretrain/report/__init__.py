"""What runs achieved: runs (what their folders hold) -> figures (numbers and tables) -> curves, page (what is read)."""
