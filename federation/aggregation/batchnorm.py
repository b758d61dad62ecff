"""BatchNorm's statistics as the clients measured them on the averaged model, put together."""

from collections.abc import Sequence
from typing import Any

from federation.aggregation.means import as_dtype, weighted_mean

import numpy as np


def pooled(measured: Sequence[tuple[list[Any], int]]) -> list[np.ndarray]:
    """Mean and variance of all clients' examples together, from (mean and variance of each layer by turns, examples).

    The variance is that of the mixture: the mean of the variances and, beside it, the variance of the means. Without
    the second part, clients of other data would give variances that are too small for the examples of all.
    """
    result = []
    for i in range(0, len(measured[0][0]), 2):
        means = [(np.asarray(arrays[i], np.float64), n) for arrays, n in measured]
        variances = [(np.asarray(arrays[i + 1], np.float64), n) for arrays, n in measured]
        mean = weighted_mean(means)
        spread = weighted_mean([((each - mean) ** 2, n) for each, n in means])
        like = measured[0][0][i : i + 2]
        result += [as_dtype(mean, like[0].dtype), as_dtype(weighted_mean(variances) + spread, like[1].dtype)]
    return result
