"""The recipe: its schema, how one is read, and all that can be wrong with it."""
