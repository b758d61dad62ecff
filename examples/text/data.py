"""Sentences and what they are about: generated ones, or a file of lines "label<TAB>sentence"."""

import functools
import re
import unicodedata
import zlib
from pathlib import Path

from federation.console import read_text
from federation.protocol import class_name
from federation.task.task import DataError

import numpy as np

DATASET = "generated"  # without --dataset
TABLE = 4096  # rows for words, of which two may share one; row 0 is for no word
MOST_WORDS = 1000  # of a text; those after them are not looked at
TOPICS = {
    "cooking": "bread butter dinner flour garlic kettle oven pepper recipe sauce soup spoon",
    "sport": "coach goal match medal player race referee score stadium team trophy whistle",
    "travel": "airport beach border hotel island luggage map passport station ticket tourist train",
    "weather": "cloud fog forecast frost hail lightning rain snow storm sunshine thunder wind",
}
NOISE = "friend house morning number people picture reason story street table thing window"
TEMPLATES = ["the {noise} was about the {}", "no {noise}, but a {} and a {}", "{}, {} and {}: is this a {noise}?"]


@functools.lru_cache(maxsize=1)
def generated(seed: int) -> list[tuple[str, str]]:
    """3,000 pairs of label and sentence: of the words that tell, seven in ten are of this topic, the others of any."""
    rng, any_topic, pairs = np.random.default_rng([seed, 1]), " ".join(TOPICS.values()), []
    for topic in rng.choice(list(TOPICS), 3000).tolist():
        words = [rng.choice((TOPICS[topic] if rng.random() < 0.7 else any_topic).split()) for _ in range(3)]
        pairs.append((topic, rng.choice(TEMPLATES).format(*words, noise=rng.choice(NOISE.split()))))
    return pairs


def open_dataset(source: str) -> dict:
    """The data set that --dataset names. Raises DataError with the number of the first line that is wrong."""
    if source == DATASET:
        return {"pairs": generated, "classes": list(TOPICS)}
    lines = [line.partition("\t") for line in _read(source).split("\n")]
    for number, (label, _, sentence) in enumerate(lines, 1):
        if (label + sentence).strip() and not (sentence.strip() and 0 < len(class_name(label)) <= 60):
            wrong = f"line {number} is no label of up to 60 characters, tab, and sentence; correct or remove it"
            raise DataError(f"{source}: {wrong}", f"in the file of its data {wrong}")
    pairs = [(class_name(label), sentence) for label, _, sentence in lines if sentence.strip()]
    if len(pairs) < 10:
        raise DataError(f"{source} has {len(pairs)} sentences; give at least 10", "it has fewer than 10 sentences")
    return {"pairs": lambda seed: pairs, "classes": sorted({label for label, _ in pairs})}


def schema(dataset: dict) -> dict:
    return {"classes": dataset["classes"], "table": TABLE}


def adopt(dataset: dict, classes: list[str]) -> None:
    dataset["classes"] = classes


def labels(dataset: dict, split: str, seed: int) -> np.ndarray:
    return np.array([dataset["classes"].index(label) for label, _ in _pairs(dataset, split, seed)], np.int64)


def load(dataset: dict, split: str, rows: np.ndarray, seed: int):  # -> tuple[torch.Tensor, torch.Tensor]
    pairs = _pairs(dataset, split, seed)
    return _examples([pairs[i][1] for i in rows], labels(dataset, split, seed)[rows], TABLE)


def read_example(path: str, schema: dict):  # -> tuple[torch.Tensor, torch.Tensor]
    """A text file as one example, with no label to speak of."""
    return _examples([_read(path)], np.zeros(1, np.int64), schema["table"])


def _pairs(dataset: dict, split: str, seed: int) -> list[tuple[str, str]]:
    """A fifth is for testing; the seed says which."""
    pairs = dataset["pairs"](seed)
    order, cut = np.random.default_rng(seed).permutation(len(pairs)), len(pairs) // 5
    return [pairs[i] for i in (order[:cut] if split == "test" else order[cut:])]


def _examples(texts: list[str], known: np.ndarray, table: int):  # -> tuple[torch.Tensor, torch.Tensor]
    """The row in the table of each word (n, words of the longest), and labels (n,), both int64.

    A word's row is a function of the word alone, so that clients need no common list of words.
    """
    import torch  # only here: who only opens a data set does without

    words = [re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())[:MOST_WORDS] for text in texts]
    rows = [torch.tensor([1 + zlib.crc32(word.encode()) % (table - 1) for word in each] or [0]) for each in words]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.from_numpy(known)


def _read(path: str) -> str:
    try:
        return read_text(Path(path).read_bytes())
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"{path} can't be read ({reason}); give a text file in UTF-8") from None
