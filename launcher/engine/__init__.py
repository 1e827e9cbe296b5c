"""What runs in a worker: the only part besides tools/ that imports torch."""
