"""What is random about training images: transforms of each image, and mixtures of two."""
