"""The subcommands of ``launch``, one module each, imported by name when asked for."""

from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
"""Folder of the recipes that come with this package."""
