"""A client's part in a run, from its credentials to the final model."""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation.client.connection import connect
from federation.client.session import Session
from federation.client.summary import about, show_final_model
from federation.console import fail
from federation.protocol import Assignment
from federation.security.audit import AuditLog, privacy_of
from federation.security.credentials import ClientCredentials
from federation.security.identity import Identity
from federation.task import saved_model
from federation.task.compute import share_cores


def take_part(args: argparse.Namespace, open_data: Callable[[], tuple[Callable[[Assignment], Any], list[str]]]) -> None:
    """Take part in the run of the server at args.server; ends the program with one line where that fails.

    open_data: opens the client's data, which may take a while, so credentials are read before; returns the function
    that makes the client of an assignment, and the names of the data's classes.
    """
    credentials = ClientCredentials.load(args)
    folder = audit_folder(args.audit)
    open_client, classes = open_data()
    session = Session(
        open_client,
        classes,
        credentials=credentials,
        wanted_partition=args.partition_id,
        slowdown=args.slowdown,
        share_cores=functools.partial(share_cores, args.threads),
        open_audit=functools.partial(open_audit, folder, credentials.identity),
    )
    connect(session, args.server, wait=args.wait, root_certificates=credentials.authority)
    if args.save:
        saved_model.save(args.save, session.client.network, about(session.client))
    show_final_model(session, args.save)


def audit_folder(path: str) -> Path:
    """Where the client's record is kept. Exits with 1 and one line where nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        words = f"--audit {path} can't be written ({error.strerror})"
        fail(f"{words}, and without a record there is no training; name another folder")
    return folder


def open_audit(folder: Path, identity: Identity | None, assignment: Assignment) -> AuditLog:
    """The record of a client's part in a run; one that comes back goes on with its file."""
    party, run = f"client {assignment.partition}", assignment.run_id
    name = f"{run or 'run'}-{party.replace(' ', '-')}.jsonl"
    return AuditLog(folder / name, run, party, privacy=privacy_of(assignment.recipe), identity=identity)
