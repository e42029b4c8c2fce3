"""Export the model of a finished run: its folder, merged weights, model card and upload."""
