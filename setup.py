"""Says that there is no package to build; the scripts run from this folder, and Flower reads pyproject.toml."""

raise SystemExit("This project is no Python package; run its scripts from its folder, as README.md says: make demo")
