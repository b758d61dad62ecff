"""A task: model.py and data.py in a folder, opened and checked. docs/own-federation.md is the contract."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from federation.config import ACCURACY, FEWEST_VALUES, METRIC_NAME, PRIVATE, Metric, Part, Recipe
from federation.console import clean, say
from federation.partition import BY_LABEL, shares
from federation.task.contract import OPTIONAL, PAGE, DataError, TaskError, broken, missing, open_file

import numpy as np

OURS = Path(__file__).parent.parent.parent  # the folder of the project's own task
UNNAMED = "own"  # a folder's name may say whose it is, so it is not told


class Task:
    """The functions of a task's two files; each raises TaskError, one line, where it returns what it must not.

    only_data: don't import model.py, and with it PyTorch, before it is asked for.
    """

    def __init__(self, folder: Path, only_data: bool = False):
        self.folder = folder
        self.data = open_file(self._file("data"))
        if not only_data:  # that all of the contract is kept shows at the start
            self.name, self.metrics, self.models, self.measures_batchnorm  # noqa: B018

    @functools.cached_property
    def model(self) -> ModuleType:
        return open_file(self._file("model"))

    # The data

    @property
    def default_dataset(self) -> str:
        """What --dataset is where it is not given."""
        return str(getattr(self.data, "DATASET", ""))

    def open_dataset(self, source: str, data_dir: str = "data", skip_damaged: bool = False) -> Any:
        """The data set that --dataset names, as data.py has it. The two options only where it knows them."""
        options = {"data_dir": data_dir, "skip_damaged": skip_damaged}
        known = inspect.signature(self.data.open_dataset).parameters
        if skip_damaged and "skip_damaged" not in known:
            raise DataError("--skip-damaged is nothing that this task knows; leave it out")
        return self.data.open_dataset(source, **{name: value for name, value in options.items() if name in known})

    def schema(self, dataset: Any) -> dict:
        """What all clients' data must have alike, as JSON: "classes", "input_shape", and what else it says."""
        schema = self.data.schema(dataset) if hasattr(self.data, "schema") else {}
        try:
            schema = json.loads(json.dumps(schema))
        except (TypeError, ValueError):
            raise self._broken("data", "schema", "a dict of texts, numbers and lists", schema) from None
        if not isinstance(schema, dict):
            raise self._broken("data", "schema", "a dict", schema)
        classes = schema.get("classes", [])
        if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
            raise self._broken("data", "schema", 'a list of names under "classes"', classes)
        return schema

    def labels(self, dataset: Any, split: str, seed: int) -> np.ndarray | None:
        """The class of each example of a split, (n,) int64; None where the task has no classes to sort by."""
        if not hasattr(self.data, "labels"):
            return None
        labels = np.asarray(self.data.labels(dataset, split, seed))
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise self._broken("data", "labels", "an array (n,) of whole numbers", labels)
        return labels

    def size(self, dataset: Any, split: str, seed: int) -> int:
        """How many examples a split has."""
        if not hasattr(self.data, "size"):
            labels = self.labels(dataset, split, seed)
            if labels is None:
                raise missing(self._file("data"), "size", "or labels(dataset, split, seed)")
            return len(labels)
        size = self.data.size(dataset, split, seed)
        if not isinstance(size, int | np.integer) or size < 0:
            raise self._broken("data", "size", "a whole number", size)
        return int(size)

    def shares(self, dataset: Any, recipe: Recipe, partitions: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Which rows of the training and of the test examples each partition has. Raises PublicError, too."""
        labels = []
        for split in ("train", "test"):
            known = self.labels(dataset, split, recipe.seed)
            if known is None and recipe.partitioner in BY_LABEL:
                raise TaskError(
                    f"--partitioner {recipe.partitioner} sorts examples by class, and this task's data.py "
                    "has no labels(dataset, split, seed); use iid, quantity-skew or local",
                    f"its task has no classes for --partitioner {recipe.partitioner}; use iid, quantity-skew or local",
                )
            labels.append(np.zeros(self.size(dataset, split, recipe.seed), np.int64) if known is None else known)
        train, test = labels
        return shares(train, test, partitions, recipe.partitioner, recipe.alpha, recipe.seed)

    def load(self, dataset: Any, split: str, rows: np.ndarray, seed: int) -> Any:
        """These examples as the model's functions take them; rows is sorted."""
        examples = self.data.load(dataset, split, rows, seed)
        for part in examples if isinstance(examples, tuple) else ():
            if hasattr(part, "shape") and (not part.shape or len(part) != len(rows)):
                must = f"as many examples as rows, {len(rows)}"
                raise self._broken("data", "load", must, f"{type(part).__name__} of shape {tuple(part.shape)}")
            if hasattr(part, "isfinite") and not part.isfinite().all():
                say(f"warning: load of {self._file('data')} gives examples with NaN or infinite values")
        return examples

    def adopt(self, dataset: Any, classes: list[str]) -> None:
        """Take these for the classes, as other clients have some that are not here."""
        if not hasattr(self.data, "adopt"):
            words = f"the federation has the classes {clean(', '.join(classes), 100)}"
            raise TaskError(
                f"{words}; give this client the same, or write adopt(dataset, classes) in data.py",
                "it has other classes than the federation, and can't adopt them",
            )
        self.data.adopt(dataset, classes)

    def columns(self, dataset: Any, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """The columns of these training examples that are scaled alike at all clients; none where it has none."""
        if not hasattr(self.data, "columns"):
            return {}
        columns = self.data.columns(dataset, rows, seed)
        try:
            numbers = {str(name): np.asarray(column, np.float64) for name, column in columns.items()}
            if any(column.shape != (len(rows),) for column in numbers.values()):
                raise ValueError
        except (AttributeError, TypeError, ValueError):
            raise self._broken("data", "columns", "a dict of arrays (rows,) by the column's name", columns) from None
        return numbers

    def column_sums(
        self, dataset: Any, rows: np.ndarray, seed: int, means: dict[str, float]
    ) -> dict[str, tuple[int, float]]:
        """By column, how many values it has, and their sum; given its mean, the sum of the squared differences to it.

        Missing values, NaN, don't count. Of a column with fewer than FEWEST_VALUES nothing is told.
        """
        sums = {}
        for name, column in self.columns(dataset, rows, seed).items():
            values = column[np.isfinite(column)]
            if len(values) >= FEWEST_VALUES and (not means or name in means):
                sums[name] = (len(values), float(((values - means[name]) ** 2 if means else values).sum()))
        return sums

    # The model

    @functools.cached_property
    def name(self) -> str:
        """What server, history and model files call the task."""
        name = getattr(self.model, "NAME", UNNAMED)
        if not isinstance(name, str) or not METRIC_NAME.fullmatch(name):
            raise self._broken("model", "NAME", "a word of letters, digits, - and _", name)
        return name

    @functools.cached_property
    def metrics(self) -> list[Metric]:
        """The main one first; the loss, and what is not named here, is shown too."""
        metrics = getattr(self.model, "METRICS", [ACCURACY])
        if not isinstance(metrics, list) or not metrics or not all(isinstance(each, Metric) for each in metrics):
            raise self._broken("model", "METRICS", "a list of federation.config.Metric", metrics)
        for each in metrics:
            if not METRIC_NAME.fullmatch(each.name):
                raise self._broken("model", "METRICS", "names of letters, digits, - and _", each.name)
        return metrics

    @functools.cached_property
    def models(self) -> dict[str, dict]:
        """The task's networks by name, each with its defaults: batch_size, learning_rate, and settings of its own."""
        models = getattr(self.model, "MODELS", {"network": {}})
        if not isinstance(models, dict) or not models or not all(isinstance(each, dict) for each in models.values()):
            raise self._broken("model", "MODELS", "a dict of dicts, by a network's name", models)
        private = [each.get(PRIVATE, {}) for each in models.values()]
        if not all(isinstance(each, dict) for each in private):
            raise self._broken("model", "MODELS", f"a dict of defaults under {PRIVATE!r}", models)
        values = [value for each in models.values() for name, value in each.items() if name != PRIVATE]
        values += [value for each in private for value in each.values()]
        if not all(isinstance(value, int | float | str) for value in values):
            raise self._broken("model", "MODELS", "defaults that are numbers, words, true or false", models)
        return models

    def complete(self, recipe: Recipe) -> Recipe:
        """With the task's own defaults. Raises PublicError."""
        return recipe.complete(self.models)

    def build(self, schema: dict, recipe: Recipe) -> Any:
        """The untrained network: the seed alone decides its weights; PyTorch's random state stays as it was."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            network = self.model.build(schema, recipe)
        if not isinstance(network, torch.nn.Module):
            raise self._broken("model", "build", "a torch.nn.Module", network)
        return network

    def train_round(self, network: Any, examples: Any, recipe: Recipe, part: Part) -> dict[str, float]:
        """One local training, in place; its metrics, by names that begin with train_ or get it."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(part.seed)
            metrics = self.model.train_round(network, examples, recipe, part)
        checked = self._checked("train_round", metrics, {"train_loss", "loss"})
        return {f"train_{name.removeprefix('train_')}": value for name, value in checked.items()}

    def private_training(self, network: Any, examples: Any) -> tuple[Any, Any, Callable]:
        """What trains privately, a module; these examples as it takes them; and the mean loss of a batch of them.

        Raises TaskError where an example becomes another one beside others, as of a mean over all of them; that is
        tried with the first.
        """
        from federation.task.training import check

        import torch

        told = self.model.private_training(network, examples)
        if not isinstance(told, tuple) or len(told) != 3 or not isinstance(told[0], torch.nn.Module):
            raise self._broken("model", "private_training", "a module, examples, and a loss", told)
        check(told[1])
        if any(len(part) != len(examples[0]) for part in told[1]):
            must, rows = f"as many rows as it got examples, {len(examples[0])}", [len(part) for part in told[1]]
            raise self._broken("model", "private_training", must, rows)
        alone = self.model.private_training(network, tuple(part[:1] for part in examples))[1]
        firsts = tuple(part[:1] for part in told[1])
        if [part.shape for part in alone] != [part.shape for part in firsts] or not all(
            torch.allclose(one.float(), first.float(), 1e-3, 1e-3, equal_nan=True)
            for one, first in zip(alone, firsts, strict=True)
        ):
            must = "each example by itself, whatever others there are"
            raise self._broken("model", "private_training", must, "another one for it alone")
        return told

    def evaluate(self, network: Any, examples: Any, recipe: Recipe) -> dict[str, float]:
        """Means over these examples, by name: the loss, the main metric, and what else there is."""
        metrics = self._checked("evaluate", self.model.evaluate(network, examples, recipe), {"loss"})
        main = self.metrics[0].name
        if main not in metrics:
            has = ", ".join(sorted(metrics))
            raise self._broken("model", "evaluate", f"the main metric {main!r} (METRICS) among its own", has)
        return metrics

    @functools.cached_property
    def measures_batchnorm(self) -> bool:
        """Whether BatchNorm's statistics are measured on each averaged model."""
        wanted = getattr(self.model, "MEASURE_BATCHNORM", True)
        if not isinstance(wanted, bool):
            raise self._broken("model", "MEASURE_BATCHNORM", "True or False", wanted)
        return wanted

    def measure_batchnorm(self, network: Any, examples: Any, recipe: Recipe) -> list[np.ndarray]:
        """Running mean and variance of each BatchNorm layer by turns, as these examples give them; see networks/."""
        from federation.task import weights  # torch, which only a client needs

        return weights.measure_batchnorm(network, lambda: self.model.evaluate(network, examples, recipe))

    def draw(self, dataset: Any, examples: Any, rows: np.ndarray, number: int, seed: int) -> Any:
        """So many of a client's training examples, these at these rows, as the seed has them: in random order.

        Where they are no tuple of tensors, which can be put in any order, they are read anew, in their own.
        """
        chosen = np.random.default_rng(seed).permutation(len(rows))[:number]
        if isinstance(examples, tuple) and all(hasattr(part, "index_select") for part in examples):
            return tuple(part[chosen] for part in examples)
        return self.load(dataset, "train", rows[np.sort(chosen)], seed)

    def has(self, name: str) -> bool:
        """Whether the task offers an optional function of its model.py or data.py."""
        return hasattr(self.data if name in OPTIONAL["data"] else self.model, name)

    @functools.cached_property
    def code_hash(self) -> str:
        """SHA-256 of the task's two files."""
        digest = hashlib.sha256()
        for name in ("data.py", "model.py"):
            digest.update((self.folder / name).read_bytes().replace(b"\r\n", b"\n") + b"\0")
        return digest.hexdigest()

    def _broken(self, name: str, function: str, must: str, was: Any) -> TaskError:
        return broken(self._file(name), function, must, was)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.py"

    def _checked(self, function: str, metrics: Any, one_of: set[str]) -> dict[str, float]:
        if not isinstance(metrics, dict):
            raise self._broken("model", function, "a dict of metrics by name", metrics)
        numbers = {}
        for name, value in metrics.items():
            try:
                numbers[str(name)] = float(value)
            except (TypeError, ValueError):
                raise self._broken("model", function, f"a number for {name!r}", value) from None
        if not one_of & set(numbers):
            raise self._broken("model", function, f"a number for {sorted(one_of)[-1]!r}", ", ".join(numbers) or "none")
        return numbers


@functools.lru_cache(maxsize=1)
def open_task(folder: str | None = None, only_data: bool = False) -> Task:
    """The task of --task; without one, the project's own two files. Raises TaskError."""
    path = Path(folder).resolve() if folder else OURS
    if not path.is_dir():
        raise TaskError(f"--task {folder} is no folder; give one with model.py and data.py: see {PAGE}")
    return Task(path, only_data)
