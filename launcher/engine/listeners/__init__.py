"""What rank 0 tells of training, and to whom."""
