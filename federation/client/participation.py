"""A client's part in a run, from its credentials to the final model."""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation.client.connection import connect
from federation.client.policy import Policy
from federation.client.session import RunEnded, Session
from federation.client.staying import stay
from federation.client.summary import about, final_score, show_final_model
from federation.console import fail
from federation.privacy.masking import Summed
from federation.privacy.private_training import PrivateClients
from federation.protocol import Assignment
from federation.security.audit import audit_folder, open_audit
from federation.security.credentials import ClientCredentials
from federation.task import saved_model
from federation.task.compute import share_cores
from federation.task.contract import DataError

OpenData = Callable[[], tuple[Callable[[Assignment], Any], list[str]]]


def take_part(args: argparse.Namespace, open_data: OpenData) -> None:
    """Take part in the run of the server at args.server, with args.stay in one after the other.

    Ends the program with one line where that fails. open_data: opens the client's data, which may take a while, so
    credentials and policy are read before; returns the function that makes the client of an assignment, and the
    names of the data's classes.
    """
    credentials, policy = ClientCredentials.load(args), Policy.load(args.policy)
    folder = audit_folder(args.audit)
    summed = Summed.load(folder, credentials.identity)
    open_client, classes = open_data()
    open_client = PrivateClients(open_client, args.budget)

    def new_session(left_run: str = "") -> Session:
        return Session(
            open_client,
            classes,
            credentials=credentials,
            policy=policy,
            left_run=left_run,
            wanted_partition=args.partition_id,
            slowdown=args.slowdown,
            share_cores=functools.partial(share_cores, args.threads),
            open_audit=functools.partial(open_audit, folder, credentials.identity),
            summed=summed,
        )

    def read_again(session: Session) -> None:
        session.policy = Policy.load(args.policy)
        credentials.refresh()

    try:
        if args.stay:
            finished = functools.partial(keep_model, args.save)
            stay(new_session, read_again, finished, args.server, credentials.authority, (DataError,))
        session = new_session()
        connect(session, args.server, wait=args.wait, root_certificates=credentials.authority)
    except RunEnded as end:
        fail(str(end), end.code)
    session.audit.close()
    if args.save:
        save_model(args.save, session)
    show_final_model(session, args.save)


def keep_model(path: str | None, session: Session) -> str:
    """Save the final model of one of several runs, as PATH with the run's id in its name; returns words for both."""
    words = final_score(session)
    if path is None:
        return words
    saved = Path(path).with_stem(f"{Path(path).stem}-{session.run_id or time.strftime('%Y-%m-%d-%H%M%S')}")
    try:
        save_model(str(saved), session)
    except saved_model.ModelFileError as error:
        return f"{words}; it is not saved: {error}"
    return f"{words}; saved as {saved}"


def save_model(path: str, session: Session) -> None:
    """Raises ModelFileError where the disk won't take it."""
    saved_model.save(path, session.client.network, {**about(session.client), **session.provenance})
