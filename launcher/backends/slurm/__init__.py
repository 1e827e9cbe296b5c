"""A run as a SLURM job: admitted, submitted, followed; the task that each node runs."""
