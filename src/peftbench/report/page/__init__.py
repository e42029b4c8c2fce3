"""The page: one file that holds everything it shows, made from records alone, which opens without a network."""
