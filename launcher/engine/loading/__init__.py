"""Images into batches: decoded, handed over by loader processes."""
