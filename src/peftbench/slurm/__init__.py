"""Runs as jobs of SLURM: what is asked of it, the scripts it is given, and what becomes of a job that was stopped."""
