"""From a recipe file to a distributed fine-tuning job and a measured, exported model."""

__version__ = "0.1.0"
