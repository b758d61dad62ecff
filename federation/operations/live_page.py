"""The report on a run while it goes on: written anew after each round, and read again by the browser by itself."""

import threading
import time

from federation.console import clean, say
from federation.results import report
from federation.results.history import History, RoundRecord
from federation.results.html import RELOAD_SECONDS
from federation.results.run_folder import Run

HTML = "text/html; charset=utf-8"
RELOAD = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="{RELOAD_SECONDS}">'
NOTHING_YET = HTML, f"{RELOAD}<p>No round is done yet.".encode()
FIRST_PAUSE = 3.0  # seconds: a run that is over by then is drawn once, at its end
SHARE = 0.1  # of one processor's time, at most, that drawing takes


class LivePage:
    """An observer. A page costs a millisecond, its pictures half a second: a thread draws them now and then."""

    def __init__(self, run: Run) -> None:
        self._folder, self._history = run.folder, run.history
        self._shown: report.Pictures = {}  # as last drawn
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._due = threading.Event()  # there is a round that is not drawn yet
        self._drawer = threading.Thread(target=self._draw, daemon=True)

    def begin(self, history: History) -> None:
        self._history = history
        self._drawer.start()

    def round(self, record: RoundRecord) -> None:
        self._write(reload=True)
        self._due.set()

    def end(self, exit_code: int) -> None:
        self._over.set()
        self._due.set()
        if self._drawer.is_alive():
            self._drawer.join()
        if exit_code and self._history.rounds:  # else the whole report follows, and the browser shall find it
            self._write(reload=False)

    def content(self) -> tuple[str, bytes]:
        """For a web server."""
        try:
            return HTML, (self._folder.path / report.PAGE).read_bytes()
        except OSError:
            return NOTHING_YET

    def _write(self, reload: bool) -> None:
        with self._writing:
            report.write_page(self._folder, self._history, None, self._shown, reload)

    def _draw(self) -> None:
        pause = FIRST_PAUSE
        while not self._over.wait(pause):
            self._due.wait()
            self._due.clear()
            if self._over.is_set():
                return
            began = time.thread_time()
            try:  # from the disk: the history in memory grows meanwhile
                self._shown = report.pictures(self._folder, self._folder.load_history())
                self._write(reload=True)
            except Exception as error:  # matplotlib's installation or its cache, the disk: many kinds
                say(f"the page goes on without new pictures ({type(error).__name__}: {clean(error)})")
                return
            pause = (time.thread_time() - began) / SHARE
