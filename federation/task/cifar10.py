"""CIFAR-10 on this machine: used where it is complete, else downloaded once."""

import socket
from pathlib import Path

from federation.console import say
from federation.task.contract import DataError


def load_cifar10(root: str, split: str):  # -> torchvision.datasets.CIFAR10
    """CIFAR-10 by torchvision: downloaded once into root, checked by its checksums. Raises DataError."""
    from filelock import FileLock  # both only here: importing torchvision costs 170 MB and a second
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(root, train=split == "train")  # complete, even where it may only be read
    except RuntimeError:
        pass
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(root) / ".download.lock"):  # of several clients, one downloads
            socket.setdefaulttimeout(30)  # a firewall that swallows packets must not hang us
            if not (Path(root) / CIFAR10.base_folder).exists():
                say(f"downloading CIFAR-10 (170 MB, once) into {root}")
            return CIFAR10(root, train=split == "train", download=True)
    except Exception as error:  # urllib, tarfile and torchvision raise a dozen kinds between them
        reason = getattr(error, "reason", None) or error
        odd = _incomplete(root, CIFAR10)
        raise DataError(
            f"CIFAR-10 can't be had in {root} ({odd}{type(error).__name__}: {reason}); "
            "use --dataset synthetic, or --dataset FOLDER with images of your own"
        ) from None
    finally:
        socket.setdefaulttimeout(None)


def _incomplete(root: str, kind) -> str:
    """Which file of a CIFAR-10 that is there is damaged or missing."""
    from torchvision.datasets.utils import check_integrity

    folder = Path(root) / kind.base_folder
    files = [(folder / name, md5) for name, md5 in kind.train_list + kind.test_list] if folder.exists() else []
    odd = [path for path, md5 in files if not check_integrity(path, md5)]
    return f"{odd[0]} is {'damaged' if odd[0].exists() else 'missing'}; " if odd else ""
