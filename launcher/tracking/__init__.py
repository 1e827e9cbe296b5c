"""Tells Weights & Biases what a run records."""
