"""The settings that the server keeps to itself; federation/setting.py says how a setting is written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from federation.aggregation.strategy import STRATEGIES, measures, unsupported
from federation.config import RUN
from federation.setting import Settings, flag, setting

AGGREGATION = "aggregation"
ASYNC = "--mode async, where N rounds mean N x clients updates"
LATE = "when clients come late, or go; times in seconds"
MODES = ("sync", "async")
BATCHNORM = ("measured", "averaged")
ONLY_ASYNC = {"mode": ("async",)}


@dataclass(frozen=True)
class ServerSettings(Settings):
    """What a run needs beside the recipe. Raises ValueError with one line where the values can't be used.

    A setting of another mode or strategy is None.
    """

    clients: int = setting(3, "places; round 1 waits for all", group=RUN, least=1)
    fraction_fit: float = setting(1.0, "part of the clients that train", group=RUN, above=0, most=1, metavar="F")
    mode: str = setting("sync", "wait for all in rounds, or for nobody", group=RUN, choices=MODES)
    target: float | None = setting(
        None, "end the run after the first round whose main metric reaches it", group=RUN, metavar="A", shown="off",
        old_flag="--target-accuracy",
    )  # fmt: skip
    strategy: str = setting("fedavg", "one of Flower's", group=AGGREGATION, choices=STRATEGIES)
    max_update_norm: float | None = setting(
        None, "clip what a client changes to this L2 norm", group=AGGREGATION, above=0, shown="off"
    )
    batchnorm: str = setting(
        None, "statistics of each new model: measured on it by all clients, or the mean of those in their updates",
        group=AGGREGATION, choices=BATCHNORM, only={"mode": ("sync",)}, shown="measured; averaged for krum",
    )  # fmt: skip
    outlier_factor: float = setting(
        20.0, "leave out updates whose step is over this many times the round's median; 0 is off", group=AGGREGATION,
        least=0, metavar="F",
    )  # fmt: skip
    server_learning_rate: float = setting(
        None, "step size of the server's optimiser; in --mode async, share of the mean that is applied",
        group=AGGREGATION, above=0, metavar="R", only={**ONLY_ASYNC, "strategy": ("fedavgm", "fedadam")},
        shown="1; 0.01 for fedadam",
    )  # fmt: skip
    server_momentum: float = setting(
        None, "fedavgm: momentum of the server's steps", group=AGGREGATION, least=0, below=1, metavar="M",
        only={"strategy": ("fedavgm",)}, shown="0.5",
    )  # fmt: skip
    malicious_clients: int = setting(
        None,
        "krum: how many clients may be hostile",
        group=AGGREGATION,
        least=0,
        only={"strategy": ("krum",)},
        shown="1",
    )
    trimmed_fraction: float = setting(
        None, "fedtrimmedavg: part of the values left out at each end", group=AGGREGATION, least=0, below=0.5,
        metavar="F", only={"strategy": ("fedtrimmedavg",)}, shown="0.34",
    )  # fmt: skip
    buffer_size: int = setting(
        None, "updates that make a version", group=ASYNC, least=1, metavar="K", only=ONLY_ASYNC, shown="2 for 3 clients"
    )
    max_staleness: int = setting(
        None,
        "drop updates of clients whose model is more versions old",
        group=ASYNC,
        least=0,
        only=ONLY_ASYNC,
        shown="10",
    )
    patience: float = setting(
        None, "wait for updates about to come, for this part of the fastest client's training time",
        group=ASYNC, least=0, most=1, metavar="F", only=ONLY_ASYNC, shown="0.25",
    )  # fmt: skip
    min_clients: int = setting(None, "go on with so many", group=LATE, shown="2")
    join_timeout: float = setting(3600.0, "for the first clients to come", group=LATE, above=0, metavar="S")
    rejoin_wait: float = setting(30.0, "for a free place to be taken", group=LATE, least=0, metavar="S")
    round_timeout: float = setting(600.0, "for a client to answer", group=LATE, above=0, metavar="S")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.names():
            if getattr(self, name) is not None and not self._applies(name):
                owners = " or ".join(f"{flag(key)} {value}" for key, values in _only(name).items() for value in values)
                raise ValueError(f"{flag(name)} is for {owners}; give both or none")
        defaults = {
            "min_clients": min(2, self.clients),
            "server_learning_rate": 0.01 if self.strategy == "fedadam" else 1.0,
            "server_momentum": 0.5,
            "malicious_clients": 1,
            "trimmed_fraction": 0.34,
            "buffer_size": -(-2 * self.clients // 3),
            "max_staleness": 10,
            "patience": 0.25,
        }
        for name, value in defaults.items():
            if self._applies(name):
                self._derive(name, value)
        if self._applies("batchnorm"):
            self._derive("batchnorm", "measured" if measures(STRATEGIES[self.strategy], self) else "averaged")
        for problem in self._contradictions():
            raise ValueError(problem)

    def _applies(self, name: str) -> bool:
        only = _only(name)
        return not only or any(getattr(self, key) in values for key, values in only.items())

    def _contradictions(self) -> Iterator[str]:
        if not 1 <= self.min_clients <= self.clients:
            yield f"--min-clients must be between 1 and --clients ({self.clients}), got {self.min_clients}"
        if self.mode == "async" and (self.strategy != "fedavg" or self.fraction_fit != 1):
            what = "--fraction-fit" if self.strategy == "fedavg" else f"--strategy {self.strategy}"
            yield f"--mode async has its own aggregation (fedbuff), and all clients train; leave out {what}"
        if self.batchnorm == "measured" and not measures(STRATEGIES[self.strategy], self):
            yield f"--batchnorm measured is for strategies that average, which {self.strategy} does not; leave it out"
        problem = unsupported(STRATEGIES[self.strategy], self)
        if problem:
            yield f"--strategy {self.strategy} {problem}"

    @classmethod
    def from_stored(cls, config: Mapping[str, Any]) -> Self:
        """As Settings', and without what earlier versions stored for all runs, whether it applied or not."""
        config = dict(config)
        mode, strategy = config.get("mode", "sync"), config.get("strategy", "fedavg")
        if "server_momentum" not in config and mode == "sync":
            config.pop("server_learning_rate", None)  # was of the asynchronous mode alone
        for name in cls.names():
            only = _only(name)
            if only and not (mode in only.get("mode", ()) or strategy in only.get("strategy", ())):
                config.pop(name, None)
        return super().from_stored(config)


def _only(name: str) -> Mapping[str, tuple[str, ...]]:
    return ServerSettings.__dataclass_fields__[name].metadata["only"] or {}
