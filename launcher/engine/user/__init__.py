"""What people bring with them, as the engine uses it: a model, a data set, a transform."""
