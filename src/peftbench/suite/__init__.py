"""Suites: all combinations of recipes and axis values, each run in a new process."""
