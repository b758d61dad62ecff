"""An asynchronous run trained again in the test's own process, from what its history.json says."""

from federation.aggregation.fedbuff import TrainingJob, replay
from federation.aggregation.validation import Update
from federation.config import Recipe
from federation.protocol import Assignment
from federation.server.settings import ServerSettings

from helpers.processes import Federation
from helpers.tiny_client import WEIGHTS, TinyClient
from helpers.updates import update


def replayed(federation: Federation, clients: list, untrained: list, buffer_positions: list[int]) -> list[bytes]:
    """The final weights of a run of three clients."""
    config = federation.history()["config"]
    rows = federation.history()["rounds"]
    versions = [row["updates"] for row in rows[1:]]
    made_from = {row["round"]: row["made_from"] for row in rows if "made_from" in row}
    settings, rounds = ServerSettings(mode="async", buffer_size=config["buffer_size"]), config["rounds"]

    def train(job: TrainingJob, base: list) -> Update:
        part = {"start": job.begins / (3 * rounds), "end": job.ends / (3 * rounds)}
        words = {"server_round": job.number, "version": job.version, "clients_on_host": 3, **part}
        weights, examples, _ = clients[job.partition].fit(base, words)
        return update(weights, examples, job.partition)

    weights = replay(versions, untrained, buffer_positions, settings, rounds, train, made_from=made_from)
    return [array.tobytes() for array in weights]


def replayed_tiny(federation: Federation) -> list[bytes]:
    clients = [TinyClient(Assignment(i, 3, Recipe())) for i in range(3)]
    return replayed(federation, clients, WEIGHTS, TinyClient.buffer_positions)


def model_bytes(federation: Federation) -> list[bytes]:
    return [array.tobytes() for array in federation.weights()]
