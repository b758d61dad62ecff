"""One FedAvg client: trains on its own images, which never leave it, and exchanges weights over gRPC."""

from federation.client.options import parse_args

ARGS = parse_args(__doc__) if __name__ == "__main__" else None  # before torch: --help and wrong use answer at once

import functools

from federation.client import model_file
from federation.client.compute import find_device, share_cores
from federation.client.connection import take_part
from federation.client.node_app import make_app
from federation.client.session import Session, title
from federation.client.summary import introduce, show_final_model
from federation.console import fail
from federation.partition import shares
from federation.process import end_on_sigterm, exit_now, keep_memory
from federation.protocol import Assignment, load_secret
from federation.security.tls import read_authority

import numpy as np
import torch
from flwr.client import NumPyClient

import model
from data import INPUT_SHAPE, DataError, load, open_dataset


class CifarClient(NumPyClient):
    """A network, this client's images, and Flower's four functions."""

    input_shape = INPUT_SHAPE

    def __init__(self, dataset, assignment: Assignment, device: str = "cpu") -> None:
        recipe, partition, self.dataset = assignment.recipe, assignment.partition, dataset
        if assignment.classes:
            dataset.adopt(list(assignment.classes))
        labels, test_labels = (dataset.labels(split, recipe.seed) for split in ("train", "test"))
        split = recipe.partitioner, recipe.alpha, recipe.seed
        train, test = shares(labels, test_labels, assignment.num_partitions, *split)
        self.recipe, self.partition = recipe, partition
        self.train_rows, self.test_rows = train[partition], test[partition]
        self.num_train, self.num_test = len(self.train_rows), len(self.test_rows)
        self.classes = dataset.classes
        self.class_counts = np.bincount(labels[self.train_rows], minlength=len(self.classes)).tolist()
        self.network = model.build(recipe.model, len(self.classes), recipe.seed).to(device)
        self.buffer_positions = model.buffer_positions(self.network)

    # Read when first needed: Flower's engines make a client anew for every message, and few need both.

    @functools.cached_property
    def train_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        return load(self.dataset, "train", self.train_rows, self.recipe.seed)

    @functools.cached_property
    def test_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        return load(self.dataset, "test", self.test_rows, self.recipe.seed)

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return model.get_weights(self.network)

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        model.set_weights(self.network, parameters)

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """Train on this client's images, starting from the global model."""
        self.set_parameters(parameters)
        span = (config["start"], config["end"]) if "start" in config else None  # of the run, where the server says so
        metrics = model.train_round(
            self.network, *self.train_set, self.recipe, self.partition, config["server_round"], span, title(config)
        )
        return self.get_parameters({}), self.num_train, metrics

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        """Score the global model on this client's test images."""
        self.set_parameters(parameters)
        metrics = model.evaluate(self.network, *self.test_set)
        return metrics.pop("loss"), self.num_test, metrics


app = make_app(CifarClient, open_dataset)  # for `flwr run`; the rest is for `python client.py`


def main(args) -> None:
    end_on_sigterm()
    keep_memory()
    secret = load_secret(args.secret_file)  # before the data, which may take a while to come
    certificates = read_authority(args.ca_certificate)
    device = find_device(args.device)
    dataset = open_dataset(args.dataset, args.data_dir, args.skip_damaged)

    def open_client(assignment: Assignment) -> CifarClient:
        client = CifarClient(dataset, assignment, device)
        client.train_set, client.test_set  # noqa: B018 (read now: the first round shall not wait for the disk)
        introduce(client, assignment)
        return client

    session = Session(
        open_client,
        dataset.classes,
        secret=secret,
        wanted_partition=args.partition_id,
        slowdown=args.slowdown,
        share_cores=functools.partial(share_cores, args.threads),
    )
    take_part(session, args.server, wait=args.wait, root_certificates=certificates)
    client = session.client
    if args.save:
        model_file.save(args.save, client.network, client.recipe.model, client.classes, INPUT_SHAPE)
    show_final_model(session, args.save, lambda images: model.predict(client.network, images))


if __name__ == "__main__":
    try:
        main(ARGS)
        exit_now(0)
    except (DataError, model_file.ModelFileError) as error:
        fail(str(error))
