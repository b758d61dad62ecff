"""A client's part in a run, from its credentials to the final model."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from federation.client.connection import connect
from federation.client.session import Session
from federation.client.summary import about, show_final_model
from federation.protocol import Assignment
from federation.security.audit import audit_folder, open_audit
from federation.security.credentials import ClientCredentials
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
        saved_model.save(args.save, session.client.network, {**about(session.client), **session.provenance})
    show_final_model(session, args.save)
