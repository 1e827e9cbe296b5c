"""The record of runs: what a run directory holds, and what can be told from it."""
