"""`python -m mlxeff`: the same as the command `mlxeff`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
