"""Answer which fine-tuning methods of a model fit a device, with which micro-batch and context length."""
