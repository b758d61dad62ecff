"""Read by pytest before any test file."""

import federation  # noqa: F401  (it sets what flwr reads when it is imported, and a test may import flwr first)
