"""Flower's SecAgg+ on its simulation engine beside this project's secure aggregation between real programs.

Three clients that return the same update in every round without training, NUMBERS weights each; five rounds of either,
and of plain FedAvg on both, as their machinery costs something too. Called by secure.py. Needs flwr[simulation].

Bytes are those of a client's messages in a round, which hold the model once to be trained and once to be evaluated: of
Flower's engine the serialised messages, of this project all that goes through its TCP connection.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.client.connection import connect
from federation.client.session import Session

import numpy as np
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Context, Message, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import message_to_proto
from flwr.server import Grid, LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.simulation import run_simulation
from helpers.processes import Federation, NetworkLink

CLIENTS, ROUNDS = 3, 5
NUMBERS = 243_136  # of the default network's trained weights
# Three shares of each secret, of which two restore it, so that one client of three may be lost; SecAgg+'s own clipping
# at ±8 in 2**22 steps; and the largest number of examples as the largest weight, with which its steps are finest.
SETTINGS = {"num_shares": CLIENTS, "reconstruction_threshold": 2, "max_weight": 100 + CLIENTS - 1}


class FixedClient(NumPyClient):
    """Returns the update of its partition, 100 + partition examples."""

    num_test = 10
    buffer_positions: list[int] = []  # noqa: RUF012

    def __init__(self, partition: int) -> None:
        self.num_train = 100 + partition
        self.update = np.random.default_rng(partition).normal(0, 0.1, NUMBERS).astype(np.float32)

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return [np.zeros(NUMBERS, np.float32)]

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        return [self.update], self.num_train, {"train_loss": 1.0}

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        return 1.0, self.num_test, {"accuracy": 0.5}


def error(mean: np.ndarray) -> float:
    """The largest, of all numbers of a mean of the clients' updates."""
    clients = [FixedClient(partition) for partition in range(CLIENTS)]
    exact = np.average([one.update for one in clients], axis=0, weights=[float(one.num_train) for one in clients])
    return float(np.abs(mean - exact).max())


# Flower's


def timed(file: Path) -> Callable:
    """secaggplus_mod, each call of which appends the seconds of processor time that it took beside the training."""

    def mod(message: Message, context: Context, call_next: Callable) -> Message:
        inside = 0.0

        def train(message: Message, context: Context) -> Message:
            nonlocal inside
            began = time.thread_time()
            answer = call_next(message, context)
            inside += time.thread_time() - began
            return answer

        began = time.thread_time()
        answer = secaggplus_mod(message, context, train)
        with file.open("a") as lines:
            lines.write(f"{message.metadata.group_id} {time.thread_time() - began - inside}\n")
        return answer

    return mod


class Keeping(FedAvg):
    """FedAvg that keeps each round's mean."""

    def __init__(self) -> None:
        start = ndarrays_to_parameters([np.zeros(NUMBERS, np.float32)])
        super().__init__(min_fit_clients=CLIENTS, min_available_clients=CLIENTS, initial_parameters=start)
        self.means: list[np.ndarray] = []

    def aggregate_fit(self, server_round: int, results: list, failures: list) -> tuple:
        assert len(results) == CLIENTS, failures
        mean, metrics = super().aggregate_fit(server_round, results, failures)
        self.means.append(parameters_to_ndarrays(mean)[0])
        return mean, metrics


def engine(secure: bool) -> dict:
    """ROUNDS rounds on the simulation engine, two clients at a time."""
    app, strategy, found = ServerApp(), Keeping(), defaultdict(list)
    sizes: dict[str, Counter] = {"down": Counter(), "up": Counter()}  # bytes by round

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        ask, waited = grid.send_and_receive, 0.0

        def counted(messages: list[Message], **options: float | None) -> list[Message]:
            nonlocal waited
            began = time.thread_time()
            messages = list(messages)
            for message in messages:
                sizes["down"][message.metadata.group_id] += message_to_proto(message).ByteSize()
            answers = list(ask(messages, **options))
            for message in answers:
                sizes["up"][message.metadata.group_id] += message_to_proto(message).ByteSize()
            waited += time.thread_time() - began
            return answers

        grid.send_and_receive = counted
        plain = DefaultWorkflow()
        fit, evaluate = SecAggPlusWorkflow(**SETTINGS) if secure else plain.fit_workflow, plain.evaluate_workflow

        def whole_round(grid: Grid, context: Context) -> None:
            nonlocal waited
            waited, began, clock = 0.0, time.thread_time(), time.perf_counter()
            fit(grid, context)
            found["server_ms"].append((time.thread_time() - began - waited) * 1000)
            evaluate(grid, context)
            found["seconds"].append(time.perf_counter() - clock)

        context = LegacyContext(context=context, config=ServerConfig(num_rounds=ROUNDS), strategy=strategy)
        DefaultWorkflow(whole_round, lambda grid, context: None)(grid, context)

    with tempfile.TemporaryDirectory() as folder:
        spent = Path(folder) / "spent"
        open_client = lambda context: FixedClient(int(context.node_config["partition-id"])).to_client()  # noqa: E731
        client = ClientApp(open_client, mods=[timed(spent)] if secure else [])
        run_simulation(app, client, CLIENTS, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
        lines = [line.split() for line in spent.read_text().splitlines()] if secure else []
    assert len(found["seconds"]) == len(strategy.means) == ROUNDS, "a round was halted"
    by_round: Counter = Counter()
    for number, seconds in lines:
        by_round[number] += float(seconds) / CLIENTS
    later = [str(number) for number in range(2, ROUNDS + 1)]  # the first warms up, and its model is the initial one
    return {
        "bytes_up": statistics.median(sizes["up"][number] for number in later) / CLIENTS,
        "bytes_down": statistics.median(sizes["down"][number] for number in later) / CLIENTS,
        "client_ms": statistics.median(by_round[number] for number in later) * 1000 if secure else 0.0,
        "server_ms": statistics.median(found["server_ms"][1:]),
        "round_seconds": statistics.median(found["seconds"][1:]),
        "largest_error": max(map(error, strategy.means)),
    }


# This project's


def play(address: str, partition: int) -> None:
    """One client in a process of its own."""
    open_client = lambda assignment: FixedClient(assignment.partition)  # noqa: E731
    connect(Session(open_client, ["cat", "dog"], wanted_partition=partition), address, wait=60)


def scripts(rounds: int, *flags: object) -> dict:
    """A whole run by real programs."""
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        link = NetworkLink(federation.address)
        federation.server("--rounds", rounds, "--clients", CLIENTS, *flags).says("waiting for")
        for partition in range(CLIENTS):
            federation.start(f"client {partition}", Path(__file__), link.address, partition)
        for process in federation.processes:
            process.ends(0)
        link.close()
        rows = federation.history()["rounds"]
        assert [row["clients"] for row in rows] == [CLIENTS] * (rounds + 1), rows
        seconds = statistics.median(row["seconds"] for row in rows[1:])
        return {"up": link.carried_up, "down": link.carried - link.carried_up, "round_seconds": seconds} | {
            "largest_error": error(federation.weights()[0])
        }


def project(*flags: object) -> dict:
    """Bytes of a round: those of so many rounds more, without joining and the end."""
    one, many = scripts(1, *flags), scripts(1 + ROUNDS, *flags)
    per_client = {f"bytes_{way}": (many[way] - one[way]) / ROUNDS / CLIENTS for way in ("up", "down")}
    return {**per_client, "round_seconds": many["round_seconds"], "largest_error": many["largest_error"]}


def beside(ours: dict) -> dict:
    """Both, plain and secure; ours: processor time of this project's masking with as many clients."""
    found = {
        "plain, this project": project(),
        "secure, this project": {**project("--secure-aggregation"), **ours},
        "plain, Flower's engine": engine(False),
        "SecAgg+, Flower's engine": engine(True),
    }
    for name, each in found.items():
        print(f"{name:<25}", json.dumps({what: float(f"{value:.4g}") for what, value in each.items()}), flush=True)
    return {"clients": CLIENTS, "rounds": ROUNDS, "settings": SETTINGS, **found}


if __name__ == "__main__":  # how this script calls itself
    play(sys.argv[1], int(sys.argv[2]))
