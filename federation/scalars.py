"""The rows of a run as TensorBoard scalars, where its package is installed."""

from collections.abc import Callable

from federation.words import fail


def open_scalars(folder: str) -> Callable[[dict], None]:
    """What to call with each row. Exits with 1 and one line where the package or the folder can't be had."""
    try:
        from tensorboard.summary import Writer  # optional, and only here; brings neither TensorFlow nor torch
    except ImportError as error:
        fail(f"--tensorboard needs the package {error.name}; install it: pip install tensorboard")
    try:
        writer = Writer(folder)
    except OSError as error:
        fail(f"--tensorboard {folder} can't be written ({error.strerror}); name another")

    def write(row: dict) -> None:
        step = row["round"]
        for name in ("accuracy", "loss", "train_loss", "clients", "seconds", "bytes_received"):
            if row[name] is not None:
                writer.add_scalar(name, row[name], step)
        for partition, accuracy in row["accuracy_by_client"].items():
            writer.add_scalar(f"accuracy_by_client/{partition}", accuracy, step)
        writer.flush()

    return write
