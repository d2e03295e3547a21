"""``python -m sinkbench``."""

from sinkbench.cli import main

if __name__ == "__main__":
    main()
