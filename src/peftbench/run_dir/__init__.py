"""Layout and files of a run's folder."""
