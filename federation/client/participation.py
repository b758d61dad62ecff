"""A client's part in a run, from its credentials to the final model."""

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from federation.client.connection import connect
from federation.client.policy import Policy
from federation.client.session import RunEnded, Session
from federation.client.summary import about, show_final_model
from federation.console import fail, say
from federation.protocol import Assignment
from federation.security.audit import audit_folder, open_audit
from federation.security.credentials import ClientCredentials
from federation.task import saved_model
from federation.task.compute import share_cores

OpenData = Callable[[], tuple[Callable[[Assignment], Any], list[str]]]
LONGEST_PAUSE = 60.0  # seconds between two tries to join


def take_part(args: argparse.Namespace, open_data: OpenData) -> None:
    """Take part in a run of the server at args.server, or, with args.stay, in one after the other.

    open_data: opens the client's data, which may take a while, so files are checked before; returns the function that
    makes the client of an assignment, and the names of the data's classes. Ends the program with one line on failure.
    """
    credentials, policy = ClientCredentials.load(args), Policy.load(args.policy)
    folder = audit_folder(args.audit)

    def one_run(wait: float) -> Session:
        open_client, classes = open_data()
        session = Session(
            open_client,
            classes,
            credentials=credentials,
            policy=policy,
            wanted_partition=args.partition_id,
            slowdown=args.slowdown,
            share_cores=functools.partial(share_cores, args.threads),
            open_audit=functools.partial(open_audit, folder, credentials.identity),
        )
        try:
            connect(session, args.server, wait=wait, root_certificates=credentials.authority)
        finally:
            session.audit.close()
        saved = named_by_run(args.save, session) if args.stay else args.save
        if saved:
            saved_model.save(saved, session.client.network, {**about(session.client), **session.provenance})
        show_final_model(session, saved)
        return session

    try:
        if args.stay:
            stay(one_run)
        one_run(args.wait)
    except RunEnded as end:
        fail(str(end), end.code)


def stay(one_run: Callable[[float], Session]) -> NoReturn:
    """Take part in one run after the other. Raises RunEnded for wrong use, which no waiting helps."""
    said, pause = "", 1.0
    while True:
        try:
            session = one_run(math.inf)
            said, pause = "", 1.0
            say(f"run {session.assignment.run_id if session.assignment else ''} is done; waiting for the next")
        except RunEnded as end:
            if end.code == 2:
                raise
            if str(end) != said:  # else it is the same as the last time: once is enough
                say(f"{end}; waiting for the next run")
                said, pause = str(end), 1.0
        time.sleep(pause)
        pause = min(LONGEST_PAUSE, 1.5 * pause)


def named_by_run(path: str | None, session: Session) -> str | None:
    """model.safetensors becomes model-<run>.safetensors."""
    if not path or not session.assignment:
        return None
    return str(Path(path).with_stem(f"{Path(path).stem}-{session.assignment.run_id or 'run'}"))
