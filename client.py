"""One FedAvg client: trains on its own examples, which never leave it, and exchanges weights over gRPC."""

from federation.client.options import parse_args

ARGS = parse_args(__doc__) if __name__ == "__main__" else None  # before torch: --help and wrong use answer at once

import functools

from federation.client.node_app import make_app
from federation.client.participation import take_part
from federation.client.session import title
from federation.client.summary import class_counts, introduce, measure_batchnorm, summarise_task
from federation.console import fail
from federation.process import end_on_sigterm, exit_now, keep_memory
from federation.protocol import Assignment
from federation.task import saved_model, weights
from federation.task.compute import find_device
from federation.task.task import DataError, Task, TaskError, open_task

import numpy as np
from flwr.client import NumPyClient


class TaskClient(NumPyClient):
    """A network, this client's examples, and Flower's four functions."""

    def __init__(self, task: Task, dataset, assignment: Assignment, device: str = "cpu") -> None:
        self.task, self.dataset, self.partition = task, dataset, assignment.partition
        self.recipe = task.complete(assignment.recipe)
        if assignment.classes:
            task.adopt(dataset, list(assignment.classes))
        self.schema = task.schema(dataset)
        self.input_shape = self.schema.get("input_shape", [])
        self.data_sizes = [task.size(dataset, split, self.recipe.seed) for split in ("train", "test")]
        train, test = task.shares(dataset, self.recipe, assignment.num_partitions)
        self.train_rows, self.test_rows = train[self.partition], test[self.partition]
        self.num_train, self.num_test = len(self.train_rows), len(self.test_rows)
        self.network = weights.keep_frozen(task.build(self.schema, self.recipe)).to(device)
        self.buffer_positions = weights.buffer_positions(self.network)
        self.batchnorm_positions = weights.batchnorm_positions(self.network) if task.measures_batchnorm else []
        if assignment.statistics:
            self.scale(assignment.statistics)
        self.task_summary, self.class_counts = summarise_task(self), class_counts(self)

    # Read when first needed: Flower's engines make a client anew for every message, and few need both.

    @functools.cached_property
    def train_set(self):
        return self.task.load(self.dataset, "train", self.train_rows, self.recipe.seed)

    @functools.cached_property
    def test_set(self):
        return self.task.load(self.dataset, "test", self.test_rows, self.recipe.seed)

    def scale(self, statistics: dict[str, list[float]]) -> None:
        """Scale the data by statistics over all clients; what was read before is read again."""
        self.task.data.scale(self.dataset, statistics)
        self.statistics = statistics
        for name in ("train_set", "test_set", "measured_set"):
            self.__dict__.pop(name, None)

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        """What travels; with "frozen" in config, what doesn't, which is asked for once."""
        if "frozen" in config:
            return list(weights.frozen_weights(self.network).values())
        return weights.get_weights(self.network, copy="in_pieces" not in config)

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        weights.set_weights(self.network, parameters)

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """Train on this client's examples, starting from the global model."""
        self.set_parameters(parameters)
        span = (config["start"], config["end"]) if "start" in config else None  # of the run, where the server says so
        part = self.recipe.part(self.partition, config["server_round"], title(config), span)
        metrics = self.task.train_round(self.network, self.train_set, self.recipe, part)
        return self.get_parameters(config), self.num_train, metrics

    def measure(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """BatchNorm's statistics of the averaged model, on some of this client's training examples."""
        self.set_parameters(parameters)
        return measure_batchnorm(self), self.num_train, {}

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        """Score the global model on this client's test examples."""
        self.set_parameters(parameters)
        metrics = self.task.evaluate(self.network, self.test_set, self.recipe)
        return metrics.pop("loss"), self.num_test, metrics


app = make_app(TaskClient)  # for `flwr run`; the rest is for `python client.py`


def main(args) -> None:
    end_on_sigterm()
    keep_memory()

    def open_data():
        device = find_device(args.device)
        task = open_task(args.task)
        dataset = task.open_dataset(args.dataset or task.default_dataset, args.data_dir, args.skip_damaged)

        def open_client(assignment: Assignment) -> TaskClient:
            client = TaskClient(task, dataset, assignment, device)
            client.train_set, client.test_set  # noqa: B018 (read now: the first round shall not wait for the disk)
            introduce(client, assignment)
            return client

        return open_client, task.schema(dataset).get("classes", [])

    take_part(args, open_data)


if __name__ == "__main__":
    try:
        main(ARGS)
        exit_now(0)
    except (DataError, TaskError, saved_model.ModelFileError) as error:
        fail(str(error))
