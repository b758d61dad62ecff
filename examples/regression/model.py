"""A number from the columns of a table, by a straight line or by a small network."""

from federation.task import regression
from federation.task.regression import METRICS, predict, private_training, train_round

from torch import nn

from data import TARGET_MEAN, TARGET_SPREAD

NAME = "regression"
MODELS = {
    "linear": {
        "batch_size": 8,
        "learning_rate": 0.005,
        "private": {"batch_size": 24, "learning_rate": 1.5},
    },
    "mlp": {
        "batch_size": 8,
        "learning_rate": 0.01,
        "hidden": 16,
        "private": {"batch_size": 24, "learning_rate": 1.0},
    },
}


def build(schema, recipe):
    width = len(schema["columns"])
    if recipe.model == "linear":
        return nn.Linear(width, 1)
    hidden = recipe.own["hidden"]
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def evaluate(network, examples, recipe):
    """The mean absolute error in the unit of the data; the loss is in that of the scaled targets."""
    scores = regression.evaluate(network, examples, recipe)
    return {**scores, "mae": scores["mae"] * TARGET_SPREAD}


def show(schema, examples, predictions):
    """Both in the unit of the data."""
    inputs, targets = examples
    return regression.show(schema, (inputs, unscaled(targets)), unscaled(predictions))


def unscaled(targets):
    return targets * TARGET_SPREAD + TARGET_MEAN
