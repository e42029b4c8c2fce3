"""What happens: bind to the machine, build from the recipe, run the one loop."""
