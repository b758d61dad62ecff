"""The command `python -m federation.report`."""

import sys

from federation.results.report import main

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
