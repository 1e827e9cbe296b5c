"""Makes what a recipe brings of the user's own into objects that the engine uses."""
