"""A real SLURM cluster of pretended nodes on one Linux machine; ``../cluster`` is its command, ``../README.md`` its use."""
