"""Compare methods of fine-tuning by memory, time and quality."""
