"""The command `python -m federation.health`."""

import sys

from federation.operations.health import main

if __name__ == "__main__":
    sys.exit(main())
