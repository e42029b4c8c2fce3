"""Training: build the components from a recipe, run the loop, capture and restore checkpoints."""
