"""The command `python -m federation.verify`."""

import sys

from federation.operations.verify import main

if __name__ == "__main__":
    sys.exit(main())
