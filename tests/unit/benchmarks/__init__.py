"""The benchmarks, where they can be tried."""
