"""Checkpoints: copied off the device, written, verified, read."""
