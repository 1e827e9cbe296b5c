"""A run that shrinks and grows: nodes that see each other, agree on who goes on, and take others in."""
