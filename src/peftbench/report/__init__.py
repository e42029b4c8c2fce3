"""Tables, HTML pages and comparisons, made from records alone. Imports no torch."""
