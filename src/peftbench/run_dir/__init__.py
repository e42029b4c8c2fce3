"""The files in a run's folder through which trainer, launcher, SLURM scripts and status reader communicate."""
