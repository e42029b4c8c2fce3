"""Run one recipe: ``accelerate launch [--config_file accel_configs/X.yaml] launch/train.py RECIPE.yaml``."""

from peftbench.train import main

if __name__ == "__main__":
    main()
