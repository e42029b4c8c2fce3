"""Loads base models and computes their loss: attention without masks, chunked cross-entropy, activation offload."""
