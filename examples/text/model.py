"""A text's topic from its words, in whatever order: the mean of their vectors, then a linear layer (fastText's way).

Joulin et al. 2017, arXiv:1607.01759, with words hashed into a table: Weinberger et al. 2009, arXiv:0902.2206.
"""

from federation.task.classification import evaluate, predict, show, train_round

from torch import nn

NAME = "text"
MODELS = {"words": {"batch_size": 8, "learning_rate": 0.5, "width": 16}}


def build(schema, recipe):
    width = recipe.own["width"]
    words = nn.EmbeddingBag(schema["table"], width, mode="mean", padding_idx=0)
    return nn.Sequential(words, nn.Linear(width, len(schema["classes"])))
