"""The command `python -m federation.report`."""

from federation.results.report import main

if __name__ == "__main__":
    main()
