"""How weights travel: as they are, or their floating-point arrays as float16, in half the bytes."""

from federation.console import PublicError

import numpy as np

COMPRESS = ("none", "fp16")
HALF = np.dtype(np.float16)  # 11 bits of precision; from 6e-8, below which a value becomes 0, to 65,504


class TooLarge(PublicError):
    """A value beyond what travels, such as float16, where it would be infinite; the text says which array holds it."""


def travels_as(dtype: np.dtype, compress: str) -> np.dtype:
    return HALF if compress == "fp16" and dtype.kind == "f" else dtype


def pack(arrays: list[np.ndarray], compress: str) -> list[np.ndarray]:
    """As they travel; with "none", the list itself. NaN and infinity stay what they are. Raises TooLarge."""
    if compress == "none":
        return arrays
    return [_packed(np.asarray(array), i, compress) for i, array in enumerate(arrays)]


def unpack(arrays: list[np.ndarray], like: list[np.ndarray]) -> list[np.ndarray]:
    """What pack() made of arrays with the dtypes of `like`, in those dtypes."""
    return [array.astype(old.dtype, copy=False) for array, old in zip(arrays, like, strict=True)]


def as_sent(weights: list[np.ndarray], compress: str) -> list[np.ndarray]:
    """The weights that arrive where these are sent; with "none", the list itself. Raises TooLarge.

    The server keeps these as the global model, so that its file, its accuracies and what clients start
    from are the same bits. Sent again they don't change.
    """
    return weights if compress == "none" else unpack(pack(weights, compress), weights)


def num_bytes(arrays: list[np.ndarray], compress: str) -> int:
    """Of the arrays on their way, without the few that Flower and gRPC add."""
    return sum(array.size * travels_as(array.dtype, compress).itemsize for array in arrays)


def _packed(array: np.ndarray, position: int, compress: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        packed = array.astype(travels_as(array.dtype, compress))
    beyond = np.isfinite(array) & ~np.isfinite(packed)
    if beyond.any():
        most = f"{np.abs(array[beyond]).max():g}"
        raise TooLarge(f"array {position} holds {most}, beyond the 65504 that --compress fp16 can carry")
    return packed
