"""The peftbench command line."""
