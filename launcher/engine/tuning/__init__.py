"""``batch.size: auto``: which batch each rank takes, measured before training."""
