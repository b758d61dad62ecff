"""The command `python -m federation.audit`."""

import sys

from federation.security.audit_check import main

if __name__ == "__main__":
    sys.exit(main())
