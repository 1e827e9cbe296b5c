"""A real SLURM cluster on one Linux machine: ``../cluster`` is its command, ``../README.md`` says how."""
