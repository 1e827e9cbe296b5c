"""What a recipe changes in an architecture: its head, dropout, BatchNorm; and weights that are made to fit it."""
