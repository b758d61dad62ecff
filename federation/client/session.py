"""A client's session with the server: it joins, then passes the rounds on to the user's NumPyClient."""

import dataclasses
import gc
import json
import secrets
import time
from collections.abc import Callable
from typing import Any, Protocol

from federation.client.policy import Policy
from federation.client.transfer import Transfer
from federation.compression import num_bytes, pack, travels_as, unpack
from federation.config import Recipe
from federation.console import PublicError, clean, say, show_fault
from federation.pieces import hash_arrays
from federation.privacy.disclosure import code_failed, host_name, numbers, summarise
from federation.privacy.masking import Masking, Summed, check_peers
from federation.protocol import PROTOCOL, RETRY_SECONDS, Assignment, CloseReason, read_provenance, read_run_id
from federation.security.audit import SERVER, AuditLog, session_name
from federation.security.clipping import clip
from federation.security.credentials import ClientCredentials
from federation.security.masks import OtherClients, to_moments

import numpy as np
from flwr.client import NumPyClient


class Learner(Protocol):
    """What a session asks of the user's client: Flower's functions, and what it says of its data.

    It may have class_counts, its training examples by class: the server keeps them for the picture of who holds what;
    and batchnorm_positions, of running mean and variance of each BatchNorm layer by turns, with measure(parameters,
    config), which returns these arrays as it measures them on that model, its examples, and {}. Of what it raises,
    the server is told the kind alone. It need not know how weights travel: it is given them in the dtypes of its own
    get_parameters({}), and may return the same.
    """

    num_train: int
    num_test: int
    buffer_positions: list[int]  # of the arrays that are measured and not trained

    def get_parameters(self, config: dict) -> list[np.ndarray]: ...

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]: ...

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]: ...


class RunEnded(Exception):
    """A client's part in a run is over, and the run was not done; the text is one line, code the exit code for it.

    Where the client itself failed, __cause__ is why.
    """

    def __init__(self, words: str, code: int = 1):
        super().__init__(words)
        self.code = code


class Session(NumPyClient):
    """Wraps the client that open_client(assignment) makes once the server has admitted it."""

    def __init__(
        self,
        open_client: Callable[[Assignment], Any],
        classes: list[str],
        *,
        credentials: ClientCredentials | None = None,
        policy: Policy | None = None,
        left_run: str = "",
        wanted_partition: int | None = None,
        slowdown: float = 1,
        share_cores: Callable[[int], None] = lambda clients_on_host: None,
        open_audit: Callable[[Assignment], AuditLog] = lambda assignment: AuditLog(),
        summed: Summed | None = None,
    ) -> None:
        self.open_client = open_client
        self.classes = classes
        self.credentials = credentials or ClientCredentials()
        self.policy = policy or Policy()
        self.left_run = left_run  # id of a run that this client does not come back to
        self.wanted_partition = -1 if wanted_partition is None else wanted_partition
        self.slowdown = slowdown
        self.share_cores = share_cores
        self.open_audit = open_audit
        self.audit = AuditLog()
        self.masking: Masking | None = None  # with secure aggregation
        self.summed = summed or Summed()
        self._measured = False  # whether the network is the model that BatchNorm's statistics were just measured on
        self.instance = secrets.token_hex(16)
        self.assignment: Assignment | None = None
        self.client: Any = None
        self.metrics: dict[str, float] = {}  # of the newest global model, on this client's test examples
        self._transfer = Transfer()
        self.close_reason: CloseReason | None = None
        self.provenance: dict = {}  # of the final model, for its file, as the server tells it with the end of the run
        self.failure: str | None = None
        self.error: Exception | None = None  # that the failure is of
        self.waiting = ""  # the server's words on the waiting list, if we are on it
        self.heard = 0  # messages from the server so far: tells progress from mere connecting
        self.joined = 0  # times that it told what its data is, and so had a place
        self.run_id = ""  # of the run that it was last offered a place in
        self._models: set[tuple[str, str]] = set()  # of this run that it worked on with its training examples

    def get_properties(self, config: dict) -> dict:
        self.heard += 1
        gc.collect(1)  # Flower's messages refer to themselves in a circle: a model in pieces would stay a while
        answer = {"hello": self._hello, "place": self._take_assignment, "told": self._take_close_reason}
        answer |= {"columns": self._columns, "store": self._store, "fetch": self._fetch, "mask": self._mask}
        return answer[config["ask"]](config)

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return self._work(lambda: self._weights(config), failed=[])

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        return self._work(lambda: self._fit(parameters, config), failed=([], 0, {}))

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        return self._work(lambda: self._evaluate(parameters, config), failed=(0.0, 0, {}))

    def _weights(self, config: dict) -> list[np.ndarray]:
        """The network's, as they travel where the server says that it knows their dtypes."""
        if self.masking:
            self.masking.check_open()
        weights = pack(self.client.get_parameters(config), self._recipe.compress if "packed" in config else "none")
        self._record("frozen-weights" if "frozen" in config else "untrained-model", None, weights)
        return weights

    def _fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        if "measure" in config:
            return self._measure(parameters, config)
        began = self._prepare(config)
        model, most = self._taken("model-to-train", parameters, config), config.get("max_update_norm", 0.0)
        start = [array.copy() for array in model] if self.masking and most else []
        weights, examples, metrics = self.client.fit(model, config)
        seconds = self._slow_down(began)
        losses = "".join(f", {name.removeprefix('train_')} {value:.3f}" for name, value in numbers(metrics).items())
        say(f"{title(config)}: trained on {examples:,} examples in {seconds:.1f} s{losses}")
        if self.masking:
            weights = clip(weights, start, most) if start else weights
            loss = float(metrics.get("train_loss", 0.0))  # which a private client doesn't tell
            return [], examples, self._entry(self.masking.seal_update(weights, loss, examples))
        packed = pack(weights, self._recipe.compress)
        self._record("update", config["server_round"], packed)
        if "in_pieces" in config:
            self._transfer.keep("update", packed)
            packed = []
        return packed, examples, numbers(metrics)

    def _measure(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """BatchNorm's statistics of a model that the server has just averaged."""
        began = self._prepare(config)
        model = self._taken("model-to-measure", parameters, config)
        statistics, examples, metrics = self.client.measure(model, config)
        self._slow_down(began)
        self._measured = True
        if self.masking:
            return [], examples, self._entry(self.masking.seal([], to_moments(statistics), examples))
        packed = pack(statistics, self._recipe.compress)
        self._record("statistics", config["server_round"], packed)
        return packed, examples, metrics

    def _evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        began = self._prepare(config)
        kind = "statistics-to-evaluate" if "measured" in config else "model-to-evaluate"
        loss, examples, metrics = self.client.evaluate(self._taken(kind, parameters, config), config)
        self._slow_down(began)
        self.metrics = {"loss": loss, **metrics}
        return loss, examples, {**numbers(metrics), **self._heads("scores", config["server_round"], config)}

    def _prepare(self, config: dict) -> float:
        """Take a share of the machine's cores; returns when the work began."""
        self.credentials.reminder.remind()
        self.share_cores(config["clients_on_host"])
        return time.monotonic()

    def _slow_down(self, began: float) -> float:
        """Sleep so long that the work since then took --slowdown times its time; returns how long it took."""
        time.sleep((time.monotonic() - began) * (self.slowdown - 1))
        return time.monotonic() - began

    def _taken(self, kind: str, parameters: list[np.ndarray], config: dict) -> list[np.ndarray]:
        """A model that came in, recorded as it travelled, in the network's dtypes."""
        measured, self._measured = self._measured, False
        if self.masking:
            self.masking.forget()
        if "in_pieces" in config:
            # Into the network at once, so that what came in takes no room while it trains.
            came = self._transfer.take()
            self._came_in(kind, came, config)
            self.client.set_parameters(unpack(came, self._views()))
            return self._views()
        self._came_in(kind, parameters, config)
        if "measured" in config:  # the model is here, as it was measured on: only the statistics have come
            if not measured:  # what is here may be what this client has trained
                raise PublicError("the server asks for scores of a model that it did not send")
            model = self._views()
            for i, array in zip(self.client.batchnorm_positions, parameters, strict=True):
                model[i] = unpack([array], [model[i]])[0]
            return model
        if self._recipe.compress == "none":
            return parameters
        return unpack(parameters, self.client.get_parameters({}))

    def _came_in(self, kind: str, model: list[np.ndarray], config: dict) -> None:
        """Record what came, and check it against the policy, before it is used. Raises AgainstPolicy.

        The same model again, as of a round that is done again, tells the server nothing new and is not counted.
        """
        sha256 = self._record(kind, config["server_round"], model, came_in=True)
        if self.policy.max_rounds and kind in ("model-to-train", "model-to-measure"):
            self._models.add((kind, sha256 or hash_arrays(model)))
        self.policy.check_work(config, len([one for one, _ in self._models if one == kind]))
        self._begin_masking(kind, config, model, sha256)

    # Secure aggregation

    def _open_masking(self, assignment: Assignment) -> None:
        before, self.masking = self.masking, None
        if assignment.recipe.secure_aggregation:
            same = before if before and before.assignment.run_id == assignment.run_id else None
            identity = self.credentials.identity or (same.identity if same else None)
            least = self.policy.min_participants or 0
            self.masking = Masking(assignment, identity, self.credentials.peers, self.summed, least)
            if not same:
                say(self.masking.describe())

    def _begin_masking(self, kind: str, config: dict, received: list[np.ndarray], sha256: str) -> None:
        """Note what a sum will be of, while the model is as it came."""
        summed = {"model-to-train": "update", "model-to-measure": "statistics"}
        if self.masking and kind in summed:
            self.masking.begin(summed[kind], received, self.classes, config, sha256)

    def _entry(self, entry: dict) -> dict:
        """What goes out instead of an update, recorded."""
        assert self.masking
        self._record("roster-entry", self.masking.round)
        return entry

    def _mask(self, config: dict) -> dict:
        """The masked update, to be fetched, once all that shall be in the sum are known."""
        masking = self.masking
        if masking is None:
            return self._fail(PublicError("this run has no secure aggregation"))
        try:
            self._record("roster", masking.round, came_in=True)
            masked = [masking.mask(config["roster"])]
            self._record(masking.kind, masking.round, masked)
            self._transfer.keep("masked", masked)
            return {}
        except OtherClients as error:  # an honest server may have lost one, and goes on with the next round
            say(f"{title({'server_round': masking.round})}: {error}")
            return {"error": error.public, "other_clients": True}
        except Exception as error:
            return self._fail(error)

    # The record of what went out and came in

    def _record(
        self,
        kind: str,
        server_round: int | None,
        arrays: list[np.ndarray] | None = None,
        came_in: bool = False,
        key: str = "",
    ) -> str:
        """Before it leaves, or before it is used. Raises audit.Unwritable, so that nothing goes unrecorded.

        Returns the hash of the arrays, where there are any and a record is kept.
        """
        what: dict[str, Any] = {"sender": SERVER} if came_in else {"receiver": SERVER}
        if self.audit.path:
            self.audit.privacy |= getattr(self.client, "spent", {})
            if key:
                what["key"] = key  # by which we know the server
            if arrays is not None:
                what |= {"sha256": hash_arrays(arrays), "bytes": num_bytes(arrays, "none")}
            self.audit.write(kind, server_round, session=session_name(self.instance), **what)
        return what.get("sha256", "")

    def _heads(self, kind: str, server_round: int | None, told: dict) -> dict[str, str]:
        """Record a message without arrays; where the server told its record's head, keep that, and return ours."""
        self.audit.take(told, server_round, SERVER)
        self._record(kind, server_round)
        return self.audit.told(server_round) if "audit" in told else {}

    @property
    def _recipe(self) -> Recipe:
        assert self.assignment
        return self.assignment.recipe

    # The server's get_properties messages

    def _hello(self, config: dict) -> dict:
        self.close_reason = None
        return {
            "protocol": PROTOCOL,
            **self.credentials.answer(config),
            "classes": json.dumps(self.classes),
            "instance": self.instance,
            "host": host_name(config.get("salt", "")),
            "wanted": self.wanted_partition,
            "held": self.assignment.partition if self.assignment else -1,
        }

    def _take_assignment(self, config: dict) -> dict:
        try:
            self.credentials.check_server(config)
            recipe = Recipe.from_json(config["recipe"])
            classes = tuple(json.loads(config.get("classes", "[]")))
            statistics = config.get("columns", "")
            place, run_id = (config["partition"], config["num_partitions"]), read_run_id(config.get("run", ""))
            assignment = Assignment(*place, recipe, classes, statistics, run_id)
            self._check_run(assignment)
            check_peers(self.credentials.peers, recipe.secure_aggregation)
            if assignment != self.assignment:
                self.audit.close()
                self.audit = self.open_audit(assignment)
            self._record("assignment", None, came_in=True, key=self.credentials.server_key)
            if assignment != self.assignment or self.client is None:
                self.client = None  # lets the old partition's examples go before the new ones are read
                client = self.open_client(assignment)
                self.policy.check_task(client)
                self.client = client
                self._open_masking(assignment)
            else:
                say(f"back in place {assignment.partition}")
            self.assignment = assignment
            counts = self.policy.send_class_counts and not recipe.secure_aggregation
            summary = summarise(self.client, class_counts=counts)
            self._record("data-summary", None)
            self.joined += 1
            return summary
        except Exception as error:
            return self._fail(error)

    def _check_run(self, assignment: Assignment) -> None:
        """Raises AgainstPolicy, or PublicError for a run that this client has left."""
        if assignment.run_id != self.run_id:
            self._models.clear()
        self.run_id = assignment.run_id
        if self.run_id and self.run_id == self.left_run:
            raise PublicError("it has left this run, and waits for the next")
        self.policy.check_run(assignment)

    def _columns(self, config: dict) -> dict:
        """Sums over the columns of the training examples; at last the statistics of all clients are taken in."""
        try:
            if "statistics" not in config:
                one, means = self.client, json.loads(config.get("means", "{}"))
                self._record("column-sums", None)
                return {
                    "columns": json.dumps(one.task.column_sums(one.dataset, one.train_rows, one.recipe.seed, means))
                }
            assert self.assignment
            assignment = dataclasses.replace(self.assignment, statistics_json=config["statistics"])
            self.client.scale(assignment.statistics)
            self.assignment = assignment
            if self.masking:
                self.masking.assignment = assignment
            return {}
        except Exception as error:
            return self._fail(error)

    def _store(self, config: dict) -> dict:
        """A piece of a large model that is about to be trained or evaluated."""
        try:
            self._transfer.store(config["start"], config["content"], self._like)
            return {}
        except Exception as error:
            return self._fail(error)

    def _fetch(self, config: dict) -> dict:
        """A piece of the last update, of the untrained model, or of its frozen arrays."""
        try:
            what, start, stop = config["what"], config["start"], config["stop"]
            words = {"frozen": True} if what == "frozen" else {"packed": True, "in_pieces": True}
            return {"content": self._transfer.fetch(what, start, stop, lambda: self._weights(words))}
        except Exception as error:
            return self._fail(error)

    def _views(self) -> list[np.ndarray]:
        return self.client.get_parameters({"in_pieces": True})

    def _like(self) -> list[tuple[tuple[int, ...], np.dtype]]:
        return [(array.shape, travels_as(array.dtype, self._recipe.compress)) for array in self._views()]

    def _take_close_reason(self, config: dict) -> dict:
        self.close_reason = CloseReason(config["kind"], clean(config["words"]), config["code"])
        if self.close_reason.kind == "wait" and self.close_reason.words != self.waiting:
            self.waiting = self.close_reason.words
            say(f"{self.waiting}; asking again every {RETRY_SECONDS} s")
            return {}
        try:
            self.provenance = {"provenance": read_provenance(config["provenance"])} if "provenance" in config else {}
            self.audit.take(config, None, SERVER)
            self.audit.write("end", outcome=self.close_reason.kind, session=session_name(self.instance))
            return self.audit.told() if "audit" in config else {}
        except (OSError, ValueError) as error:
            return self._fail(error)

    # Failures

    def _work(self, task: Callable[[], Any], failed: Any) -> Any:
        self.heard += 1
        try:
            return task()
        except Exception as error:
            report = self._fail(error)
            return (*failed[:-1], report) if isinstance(failed, tuple) else failed

    def _fail(self, error: Exception) -> dict:
        """What goes to the server, in words of ours alone; the details are shown here."""
        own = getattr(error, "public", None)
        self.error, self.failure = error, clean(error) or type(error).__name__
        if own is None:  # in the user's code, or a fault of ours: show where
            self.failure = f"{type(error).__name__}: {clean(error)}" if str(error) else type(error).__name__
            show_fault(error)
        return {"error": own or code_failed(error)}

    def raise_for_end(self) -> None:
        """Return where the run is done. Raises RunEnded."""
        if self.failure:
            raise RunEnded(self.failure) from self.error
        if self.close_reason and self.close_reason.kind != "finished":
            raise RunEnded(f"{self.close_reason.kind}: {self.close_reason.words}", self.close_reason.code)


def title(config: dict) -> str:
    """What a training is called: an asynchronous server numbers each client's own."""
    if "version" in config:
        return f"training {config['server_round']}, from version {config['version']}"
    return f"round {config['server_round']}"
