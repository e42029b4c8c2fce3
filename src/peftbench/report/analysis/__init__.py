"""Statistics over records: groups, intervals, significance, comparability."""
