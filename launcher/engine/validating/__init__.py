"""What is measured of a model between two epochs."""
