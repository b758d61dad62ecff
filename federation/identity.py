"""The command `python -m federation.identity`."""

from federation.security.identity import main

if __name__ == "__main__":
    main()
