"""Sends a run's records to Weights & Biases."""
