"""The command `python -m federation.certificates`."""

from federation.security.certificates import main

if __name__ == "__main__":
    main()
