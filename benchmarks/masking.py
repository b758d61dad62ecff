"""What masking takes, in this process: milliseconds of a client and of the server, and memory. Called by secure.py."""

import json
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.config import Recipe
from federation.privacy.masking import Masking
from federation.protocol import Assignment
from federation.security.masks import decode

import numpy as np
from memory import measure

NUMBERS = 243_136  # of the default network's trained weights
ROSTERS = {3: 11, 100: 3}  # clients, and how often all mask
LARGE = 25_000_000  # numbers: 100 MB
CLIENTS = 3  # of the large model


def updates_of(clients: int, size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) * np.float32(0.1) for _ in range(clients)]


def sealed(updates: list[np.ndarray]) -> tuple[list[Masking], str, list[float]]:
    """The clients, each with its trained update; the roster; and the seconds that each has taken."""
    size, number, recipe = updates[0].size, len(updates), Recipe(secure_aggregation=True)
    clients = [Masking(Assignment(i, number, recipe, run_id="0123456789abcdef")) for i in range(number)]
    start, entries, spent = [np.zeros(size, np.float32)], [], []
    for i, (client, update) in enumerate(zip(clients, updates, strict=True)):
        began = time.process_time()
        client.begin("update", start, ["cat", "dog"], {"server_round": 1})
        entries.append(client.seal_update([update], 1.0, 100 + i))
        spent.append(time.process_time() - began)
    return clients, json.dumps(entries), spent


def mask_and_sum(updates: list[np.ndarray]) -> tuple[np.ndarray, list[float], float, int]:
    """The mean; seconds of each client, and of the server; bytes of the masked words."""
    clients, roster, spent = sealed(updates)
    masked = []
    for i, client in enumerate(clients):
        began = time.process_time()
        masked.append(client.mask(roster))
        spent[i] += time.process_time() - began
    began = time.process_time()
    total = np.zeros_like(masked[0])
    for words in masked:
        total += words
    decoded = decode(total, updates[:1], 1)
    server = time.process_time() - began
    assert decoded, "masks are left in the sum"
    return decoded[0][0], spent, server, masked[0].nbytes


def cost(number: int, size: int, repeat: int) -> dict:
    """Milliseconds, medians of all clients and so many times; how far the mean is from the one in float64."""
    updates, client, server = updates_of(number, size), [], []
    for _ in range(repeat):
        mean, spent, summing, bytes_up = mask_and_sum(updates)
        client += spent
        server.append(summing)
    exact = np.zeros(size)
    for i, update in enumerate(updates):
        exact += update * ((100 + i) / sum(range(100, 100 + number)))
    found = {
        "client_ms": statistics.median(client) * 1000,
        "client_ms_first": client[0] * 1000,  # libraries warm up, where it is the first of its process
        "server_ms": statistics.median(server) * 1000,
        "largest_error": float(np.abs(mean - exact).max()),
        "bytes_up": bytes_up,
        "weights_bytes": updates[0].nbytes,
    }
    print(f"{size:,} numbers, {number:>3} clients:", end=" ")
    print("{client_ms:.1f} ms at a client (the first {client_ms_first:.1f}), ".format(**found), end="")
    print("{server_ms:.1f} ms at the server, largest error {largest_error:.1e}".format(**found), flush=True)
    return found


def rosters() -> dict:
    return {str(number): cost(number, NUMBERS, repeat) for number, repeat in ROSTERS.items()}


def large() -> dict:
    """In process, with the most memory that masking takes beside the update; and the peaks of real programs."""
    found = cost(CLIENTS, LARGE, 3)
    clients, roster, _ = sealed(updates_of(CLIENTS, LARGE))
    tracemalloc.start()
    clients[0].mask(roster)
    found["client_peak_bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del clients
    print(f"masking takes {found['client_peak_bytes'] / (4 * LARGE):.2f} models of memory at a client", flush=True)
    runs = {}
    for kind, flags in (("plain", []), ("secure", ["--secure-aggregation"])):
        runs[kind] = measure(4 * LARGE / 1e6, CLIENTS, *flags)
        words = "server {server_mb:.0f} MB, a client {client_mb:.0f} MB, a round {round_seconds:.1f} s"
        print(f"as programs, {kind:<6} {words.format(**runs[kind])}", flush=True)
    return {**found, "programs": runs}
