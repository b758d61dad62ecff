"""The client's side on Flower's engines, which make a client anew for every message: nothing is kept in between."""

import functools
import json
from collections.abc import Callable
from typing import Any

from federation.client.session import Session
from federation.config import Recipe
from federation.console import PublicError, clean
from federation.privacy.budget import check_budget
from federation.privacy.disclosure import host_name, summarise
from federation.protocol import Assignment
from federation.task.task import open_task

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp

REMEDY = "start each node with --node-config 'partition-id=0 num-partitions=3', and its own number"


def make_app(client_class: Callable[..., Any]) -> ClientApp:
    """The ClientApp of a NumPyClient made of (task, dataset, assignment, device), on the project's own task."""

    def client_fn(context: Context) -> Client:
        from federation.task.compute import share_cores  # torch, which only a node needs

        where = {**context.run_config, **context.node_config}  # a node may have data and a device of its own
        data, device = (where["dataset"], where["data-dir"]), str(where.get("device") or "auto")
        threads = int(where.get("threads") or 0)
        return Node(
            context,
            lambda assignment: _open_client(client_class, data, find_node_device(device), assignment),
            functools.partial(share_cores, threads),
        ).to_client()

    return ClientApp(client_fn=client_fn)


# Kept in the module: the simulation engine pickles client_fn for its processes, and a cache inside of it can't be.


@functools.lru_cache(maxsize=1)
def _open_data(name: str, data_dir: str) -> Any:
    return open_task().open_dataset(name, data_dir)


@functools.lru_cache(maxsize=1000)  # a process of the simulation engine plays many nodes, each of them many times
def _open_client(
    client_class: Callable[..., Any],
    data: tuple[str, str],
    device: str,
    assignment: Assignment,
) -> Any:
    return client_class(open_task(), _open_data(*data), assignment, device)


def find_node_device(wanted: str) -> str:
    """As a script's --device; but where it isn't there, the server is told so, and the node lives on."""
    from federation.task.compute import find_device

    try:
        return find_device(wanted)
    except SystemExit:
        raise PublicError(f"its device {clean(wanted, 20)} is not there") from None


class Node(Session):
    """A Session of one message, with the partition from the node config and the recipe from the run config.

    open_client(assignment) as for Session; that client also has a `schema`. What goes wrong is told to the server.
    """

    def __init__(
        self, context: Context, open_client: Callable[[Assignment], Any], share_cores: Callable[[int], None]
    ) -> None:
        super().__init__(open_client, classes=[], share_cores=share_cores)
        self.context = context

    def get_properties(self, config: dict) -> dict:
        return self._work(lambda: self._describe(config), failed=())

    def _describe(self, config: dict) -> dict:
        assert self.assignment
        return {
            "classes": json.dumps(self.client.schema.get("classes", [])),
            "instance": self.instance,
            "host": host_name(config.get("salt", "")),
            "wanted": self.assignment.partition,
            "held": -1,
            "num_partitions": self.assignment.num_partitions,
            **summarise(self.client),
        }

    def _work(self, task: Callable[[], Any], failed: Any) -> Any:
        """As Session's, but the client has to be opened first, and even a failure to describe it is told."""

        def open_and_do() -> object:
            self.assignment = read_assignment(self.context)
            check_budget(None, self.assignment.recipe)
            self.client = self.open_client(self.assignment)
            return task()

        answer = super()._work(open_and_do, failed)
        return answer[0] if isinstance(answer, tuple) and len(answer) == 1 else answer


def read_assignment(context: Context) -> Assignment:
    """Raises ValueError, one line, where node config or run config can't be used."""
    try:
        partition, number = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    except (KeyError, ValueError, TypeError):
        raise PublicError(f"its node config names no partition; {REMEDY}") from None
    return Assignment(partition, number, Recipe.from_run_config(context.run_config))
