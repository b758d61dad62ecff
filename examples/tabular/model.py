"""Classes from the columns of a table, by logistic regression or by a small network."""

from federation.config import ACCURACY, Metric
from federation.task import classification
from federation.task.classification import auc, predict, show, train_round
from federation.task.training import outputs

import torch
from torch import nn

METRICS = [Metric("auc", lowest=0, highest=1, chance=0.5, additive=False), ACCURACY]
NAME = "tabular"
MODELS = {
    "logistic": {"batch_size": 8, "learning_rate": 0.03},
    "mlp": {"batch_size": 8, "learning_rate": 0.03, "hidden": 16},
}


def build(schema, recipe):
    inputs = len(schema["columns"]) + sum(map(len, schema["categories"].values()))
    if recipe.model == "logistic":
        return nn.Linear(inputs, len(schema["classes"]))
    hidden = recipe.own["hidden"]
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, len(schema["classes"])))


def evaluate(network, examples, recipe):
    """Loss, accuracy, and the AUC: of each class against the others, then the mean. Of two classes both are the same.

    A class that no example here has, or all, has no AUC and is left out.
    """
    scores, classes = outputs(network, examples).double().softmax(1), examples[-1]
    by_class = [auc(scores[:, number], classes == number) for number in range(scores.shape[1])]
    return {**classification.evaluate(network, examples, recipe), "auc": torch.tensor(by_class).nanmean().item()}
