"""A web server for this machine alone: it answers GET for a few fixed paths, and nothing else."""

import http.server
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus

from federation.console import fail, show_fault

HERE = "127.0.0.1"
NAMES = (HERE, "localhost")
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
Page = Callable[[], tuple[str, bytes]]  # its content type, and the content of this moment


def url(port: int, path: str = "/") -> str:
    return f"http://{HERE}:{port}{path}"


def serve(pages: Mapping[str, Page], port: int, flag: str) -> http.server.HTTPServer:
    """Serve the pages, by path, in threads of their own. Exits with 1 and one line where the port can't be had."""

    class Handler(_Handler):
        found = pages

    try:
        server = _Server((HERE, port), Handler)
    except OSError as error:
        fail(f"{flag} {port} can't be had ({error.strerror}); give another port")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Handler(http.server.BaseHTTPRequestHandler):
    found: Mapping[str, Page] = {}
    timeout = 10  # seconds, for the next request or its rest
    server_version, sys_version = "federation", ""

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def _answer(self, with_content: bool) -> None:
        # By another name for this machine a page from elsewhere could read ours (DNS rebinding).
        if self.headers.get("Host", "").partition(":")[0].lower() not in NAMES:
            return self.send_error(HTTPStatus.FORBIDDEN, f"Ask for {' or '.join(NAMES)}")
        page = self.found.get(self.path)
        if page is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        kind, content = page()
        self.send_response(HTTPStatus.OK)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: a page that reloads itself would fill the terminal."""


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that has gone is no news."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):
            show_fault(error)
