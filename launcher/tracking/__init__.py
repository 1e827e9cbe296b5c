"""Sends a run's records to Weights & Biases, TensorBoard or MLflow."""
