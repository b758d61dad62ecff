"""One FedAvg client: trains on its own images, which never leave it, and exchanges weights over gRPC."""

import argparse
import functools
import os
import signal
import sys
import time
from pathlib import Path

from federation.address import parse_server_address
from federation.connection import stay_connected
from federation.handshake import load_secret
from federation.member import Member, Seat, leave
from federation.memory import keep_memory
from federation.node import Node
from federation.partition import partition, split_test_set
from federation.recipe import Recipe
from federation.tls import read_authority
from federation.words import fail, say

import numpy as np
import torch
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from tqdm import tqdm

import model
import model_file
from data import DataError, open_dataset

DEVICES = ["auto", "cpu", "cuda", "mps"]


class CifarClient(NumPyClient):
    """The learning itself: a network, this client's images, and Flower's four methods."""

    def __init__(
        self, dataset, seat: Seat, *, device: str = "cpu", threads: int | None = None, slowdown: float = 1
    ) -> None:
        self.seat = seat
        self.recipe = recipe = seat.recipe
        self.classes = dataset.classes
        self.device = torch.device(device)
        self.threads = threads
        self.slowdown = slowdown
        train, test = share(dataset, seat)
        self._load_train = functools.partial(load, dataset, "train", train, recipe.seed)
        self._load_test = functools.partial(load, dataset, "test", test, recipe.seed)
        self.num_train, self.num_test = len(train), len(test)
        labels = dataset.labels("train", recipe.seed)[train]
        self.class_counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        self.network = model.build(recipe.model, len(self.classes), recipe.seed).to(self.device)
        self.statistics = model.statistics(self.network)
        self.accuracy: float | None = None  # of the newest global model, on this client's test images

    # Read when first needed: Flower's engines make a client anew for every message, and few need both.

    @functools.cached_property
    def train_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._load_train()

    @functools.cached_property
    def test_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._load_test()

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return model.get_weights(self.network)

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        model.set_weights(self.network, parameters)

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        server_round, recipe = config["server_round"], self.recipe
        # An asynchronous server numbers this client's trainings, and says which part of the run each one is.
        what = f"training {server_round}, from version {config['version']}" if "version" in config else ""
        what = what or f"round {server_round}"
        self.use_cores(config["clients_on_host"])
        self.set_parameters(parameters)
        began = time.monotonic()
        with tqdm(desc=what, unit=" batches", leave=False, disable=None) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            loss = model.train(
                self.network,
                *self.train_set,
                epochs=recipe.local_epochs,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                start=config.get("start", (server_round - 1) / recipe.rounds),
                end=config.get("end", server_round / recipe.rounds),
                seed=round_seed(recipe.seed, self.seat.partition, server_round),
                on_batch=show,
            )
        self.dawdle(began)
        seconds = time.monotonic() - began
        say(f"{what}: trained on {self.num_train:,} images in {seconds:.1f} s, loss {loss:.3f}")
        return self.get_parameters({}), self.num_train, {"train_loss": loss}

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        self.use_cores(config["clients_on_host"])
        began = time.monotonic()
        self.set_parameters(parameters)
        loss, self.accuracy = model.evaluate(self.network, *self.test_set)
        self.dawdle(began)
        return loss, self.num_test, {"accuracy": self.accuracy}

    def dawdle(self, began: float) -> None:
        """Sleep so long that the work since then took --slowdown times its time."""
        time.sleep((time.monotonic() - began) * (self.slowdown - 1))

    def use_cores(self, clients_on_host: int) -> None:
        """Share the machine's cores with the other clients on it instead of fighting for them."""
        torch.set_num_threads(self.threads or max(1, num_cores() // clients_on_host))


def share(dataset, seat: Seat) -> tuple[np.ndarray, np.ndarray]:
    """Which training and test examples are this client's. Raises ValueError where there are too few."""
    train, test = shares(dataset, seat.num_partitions, seat.recipe)
    return train[seat.partition], test[seat.partition]


def shares(dataset, num_partitions: int, recipe: Recipe) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The same for all clients: training and test examples by partition."""
    labels = {split: dataset.labels(split, recipe.seed) for split in ("train", "test")}
    train = partition(recipe.partitioner, labels["train"], num_partitions, recipe.seed, recipe.alpha)
    return train, split_test_set(recipe.partitioner, labels["test"], num_partitions, recipe.seed)


def load(dataset, split: str, indices: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of these examples."""
    return torch.from_numpy(dataset.images(split, indices, seed)), torch.from_numpy(
        dataset.labels(split, seed)[indices]
    )


def round_seed(seed: int, partition: int, server_round: int) -> int:
    """Randomness as a function of these three, so that a client that died and came back trains the same."""
    return int(np.random.SeedSequence([seed, partition, server_round]).generate_state(1, np.uint64)[0] >> 1)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


open_dataset_once = functools.lru_cache(maxsize=1)(open_dataset)


@functools.lru_cache(maxsize=1000)
def open_node(name: str, data_dir: str, seat: Seat) -> CifarClient:
    """Kept: a process of the simulation engine plays many nodes, each of them many times."""
    return CifarClient(open_dataset_once(name, data_dir), seat)


def client_fn(context: Context) -> Client:
    where = {**context.run_config, **context.node_config}  # a node may have images of its own
    return Node(context, lambda seat: open_node(where["dataset"], where["data-dir"], seat)).to_client()


app = ClientApp(client_fn=client_fn)  # for `flwr run`; the rest is for `python client.py`


def introduce(client: CifarClient) -> None:
    """Say what this client holds: its class distribution."""
    seat, sizes = client.seat, f"{client.num_train:,} training and {client.num_test:,} test images"
    say(f"joined with partition {seat.partition} of {seat.num_partitions}: {sizes}; training images by class:")
    columns = [f"{name} {count:,}" for name, count in zip(client.classes, client.class_counts, strict=True)]
    for start in range(0, len(columns), 5):
        say("  " + "".join(f"{column:<18}" for column in columns[start : start + 5]).rstrip())


def show_final_model(client: CifarClient, save: str | None) -> None:
    """What this client can do with the global model that the run left it."""
    say(f"accuracy of the final global model on this client's {client.num_test:,} test images: {client.accuracy:.4f}")
    if save:
        try:
            model_file.save(save, client.network, client.recipe.model, client.classes)
        except OSError as error:
            fail(f"--save {save} can't be written ({error.strerror})")
        say(f"saved the final global model as {save}")
    some = np.linspace(0, client.num_test - 1, min(10, client.num_test)).astype(int)
    images, labels = (each[some] for each in client.test_set)
    guesses = model.predict(client.network, images).argmax(1)
    say("ten of its test images (truth → prediction):")
    for label, guess in zip(labels.tolist(), guesses.tolist(), strict=True):
        say(f"  {'✓' if label == guess else '✗'} {client.classes[label]} → {client.classes[guess]}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    usage = "%(prog)s [options]; --help lists them"  # one line, as it comes before every error
    parser = argparse.ArgumentParser(
        description=__doc__, usage=usage, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--server", default="127.0.0.1:8080", metavar="HOST:PORT", help="where the server listens")
    add("--dataset", default="cifar10", help="cifar10, synthetic (generated), or a FOLDER of train|test/<class>/*")
    add("--data-dir", default="data", help="where CIFAR-10 is kept, or downloaded to once")
    add("--partition-id", type=int, metavar="N", help="ask for a certain partition (default: the first free)")
    add(
        "--threads", type=int, metavar="N", help="CPU threads (default: a share of the cores among this host's clients)"
    )
    add("--device", default="auto", choices=DEVICES, help="where to train")
    add("--slowdown", type=float, default=1, metavar="F", help="sleep to be F times slower: for experiments")
    add("--save", metavar="FILE", help="keep the final global model as a PyTorch state_dict")
    add("--wait", type=float, default=300, metavar="SECONDS", help="how long to ask for a server that is not there")
    add("--secret-file", metavar="FILE", help="the shared secret that the server asks for (or FEDERATION_SECRET)")
    add("--ca-certificate", metavar="FILE", help="the authority of the server's TLS certificate; turns TLS on")
    args = parser.parse_args(argv)
    try:
        parse_server_address(args.server)
    except ValueError as error:
        parser.error(f"--server {error}")
    if args.partition_id is not None and args.partition_id < 0:
        parser.error(f"--partition-id must be at least 0, got {args.partition_id}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if not 1 <= args.slowdown < float("inf"):
        parser.error(f"--slowdown must be at least 1, got {args.slowdown:g}")
    if not args.wait >= 0:  # NaN too: it would wait for ever
        parser.error(f"--wait must be at least 0, got {args.wait:g}")
    args.device = find_device(parser, args.device)
    if args.save and not Path(args.save).absolute().parent.is_dir():
        parser.error(f"--save {args.save}: its folder does not exist")
    return args


def find_device(parser: argparse.ArgumentParser, wanted: str) -> str:
    """The device of --device; auto is the fastest there is."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if wanted == "auto":
        return next(name for name, there in available.items() if there())
    if not available[wanted]():
        parser.error(f"--device {wanted} is not there on this machine; use --device auto")
    return wanted


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(args.threads or 1)
    keep_memory()
    secret = load_secret(args.secret_file)  # before the data, which may take a while to come
    try:
        certificates = read_authority(args.ca_certificate) if args.ca_certificate else None
        dataset = open_dataset(args.dataset, args.data_dir)
    except (DataError, OSError) as error:
        fail(str(error))

    def open_client(seat: Seat) -> CifarClient:
        client = CifarClient(dataset, seat, device=args.device, threads=args.threads, slowdown=args.slowdown)
        client.train_set, client.test_set  # noqa: B018 (read now: the first round shall not wait for the disk)
        introduce(client)
        return client

    wanted = -1 if args.partition_id is None else args.partition_id
    member = Member(open_client, dataset.classes, secret=secret, wanted_partition=wanted)
    stay_connected(member, args.server, wait=args.wait, root_certificates=certificates)
    leave(member)
    show_final_model(member.client, args.save)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
        os._exit(0)  # Python's own way out spends half a second on clearing up after torch
    except KeyboardInterrupt:
        sys.exit(130)
