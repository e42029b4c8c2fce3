"""Readers of JSON lines, CSV and Parquet files, which yield the cells of the used columns as they are written."""
