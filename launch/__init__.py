"""Submission, stopping and watching of runs: knows SLURM and submitit, and no mathematics."""
