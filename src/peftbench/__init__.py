"""Which way of fine-tuning fits, what it costs and what it brings."""
