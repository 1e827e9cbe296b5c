"""Post-steps: what becomes of a trained checkpoint."""
