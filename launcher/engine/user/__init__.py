"""What people bring with them, as the engine uses it: a model, data, a loss, metrics, listeners."""
