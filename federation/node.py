"""The client's side on Flower's engines, which make a client anew for every message: nothing is kept in between."""

import json
from collections.abc import Callable

from federation.engine import read_run_config
from federation.member import Member, Seat, host_name, tell_holdings

from flwr.app import Context
from flwr.client import NumPyClient

REMEDY = "start each node with --node-config 'partition-id=0 num-partitions=3', and its own number"


class Node(Member):
    """A Member for one message, whose seat is in its node config and whose recipe is in the run config.

    open_client(seat) as for Member; that client also has `classes`. What goes wrong is told to the server.
    """

    def __init__(self, context: Context, open_client: Callable[[Seat], NumPyClient]) -> None:
        super().__init__(open_client, classes=[])
        self.context = context

    def get_properties(self, config: dict) -> dict:
        return self._work(self._describe, failed=())

    def _describe(self) -> dict:
        return {
            "classes": json.dumps(self.client.classes),
            "instance": self.instance,
            "host": host_name(),
            "wanted": self.seat.partition,
            "held": -1,
            "num_partitions": self.seat.num_partitions,
            **tell_holdings(self.client),
        }

    def _work(self, task: Callable, failed: object) -> object:
        """As Member's, but the client has to be opened first, and even a failure to describe it is told."""

        def open_and_do() -> object:
            self.seat = read_seat(self.context)
            self.client = self.open_client(self.seat)
            return task()

        answer = super()._work(open_and_do, failed)
        return answer[0] if isinstance(answer, tuple) and len(answer) == 1 else answer


def read_seat(context: Context) -> Seat:
    """Raises ValueError, one line, where node config or run config won't do."""
    try:
        partition, number = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"node config {dict(context.node_config)} names no partition; {REMEDY}") from None
    return Seat(partition, number, read_run_config(context.run_config, clients=number).recipe)
