"""Runs as SLURM jobs: sbatch options, batch scripts, submission and requeuing."""
