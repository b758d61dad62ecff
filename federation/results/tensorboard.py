"""The rounds of a run as TensorBoard scalars, where its package is installed."""

from federation.console import fail
from federation.results.history import History, RoundRecord


class TensorBoard:
    """An observer. Exits with 1 and one line where the package or the folder can't be had."""

    def __init__(self, folder: str) -> None:
        try:
            from tensorboard.summary import Writer  # optional, and only here; brings neither TensorFlow nor torch
        except ImportError:
            fail("--tensorboard needs the package tensorboard; install it: pip install tensorboard")
        try:
            self._writer = Writer(folder)
        except OSError as error:
            fail(f"--tensorboard {folder} can't be written ({error.strerror}); name another")

    def begin(self, history: History) -> None:
        """Nothing to write before the first round."""

    def round(self, record: RoundRecord) -> None:
        scalars = {**record.metrics, **record.train_metrics, "clients": record.clients, "seconds": record.seconds}
        scalars["bytes_received"] = record.bytes_received
        for name, values in record.by_client.items():
            scalars |= {f"{name}_by_client/{partition}": value for partition, value in values.items()}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record.round)
        self._writer.flush()

    def end(self, exit_code: int) -> None:
        self._writer.close()
