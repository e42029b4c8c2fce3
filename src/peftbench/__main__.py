"""The command line as a module: ``python -m peftbench``."""

from peftbench.cli.app import main

if __name__ == "__main__":
    main()
