"""The record of runs: the files of a run directory, and what they say about the run."""
