"""Which weights learn how fast, by which optimizer, and how the rates go over training."""
