"""Measurements of a run. The Probe owns every clock, device synchronization and peak reset."""
