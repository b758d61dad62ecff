"""Updates and strategies in a line, for tests of the aggregation."""

from federation.aggregation.strategy import STRATEGIES, CheckedStrategy
from federation.aggregation.validation import Update
from federation.server.settings import ServerSettings

import numpy as np


def update(weights: list[np.ndarray], examples: int = 1, partition: int = 0, **metrics: float) -> Update:
    return Update(partition, weights, examples, metrics or {"train_loss": 1.0})


def strategy(
    name: str, weights: list[np.ndarray], buffer_positions: list[int], compress: str = "none", **settings: object
) -> CheckedStrategy:
    made = ServerSettings(strategy=name, **settings)
    return CheckedStrategy(STRATEGIES[name], made, weights, buffer_positions, compress)
