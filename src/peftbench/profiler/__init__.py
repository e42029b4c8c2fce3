"""The instruments. The Probe owns every clock, device synchronisation and peak reset."""
