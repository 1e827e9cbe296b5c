"""The subcommands of ``launch``, one module each, imported at first use."""

import argparse


def parser_of(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for the arguments of ``launch VERB``."""
    return argparse.ArgumentParser(prog=f"launch {verb}", description=description, allow_abbrev=False)
