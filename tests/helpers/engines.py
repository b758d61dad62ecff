"""Flower's own programs for tests: a SuperLink on a free port with a home of its own, and what talks to it."""

import os
import re
import shlex
import sys
from pathlib import Path

from helpers.fork_server import SUPPORTED, ForkServer
from helpers.processes import CLEAN, ROOT, Federation, Process, free_port

PROGRAMS = Path(sys.executable).parent  # flwr, flower-superlink and flower-supernode are installed beside Python
THEIRS = ("flwr.cli.app", "flwr.superlink.cli", "flwr.supernode.cli", "flwr.supercore.cli")  # modules they begin with


class Engine(Federation):
    """Ends what it started, and nothing else; the programs don't touch the user's ~/.flwr.

    They, and what they start by name, such as one for each message to a node, are forks: see fork_server.py.
    fresh: they are not.
    """

    def __init__(self, folder: Path, connection: str, fresh: bool = False):
        super().__init__(folder)
        self.env = {
            **CLEAN,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        self.forks = None
        if SUPPORTED and not fresh:
            self.env["FLWR_LOG_LEVEL"] = "INFO"  # theirs; federation, which is imported first, would change it
            self.env["PATH"] = f"{folder / 'programs'}{os.pathsep}{self.env['PATH']}"
            self.forks = ForkServer(self.env, *THEIRS)
            (folder / "programs").mkdir()
            for program in (*PROGRAMS.glob("flwr*"), *PROGRAMS.glob("flower*")):
                _, _, rest = program.read_text().partition("\n")
                (folder / "programs" / program.name).write_text(f"#!{self.forks.python}\n{rest}")
                (folder / "programs" / program.name).chmod(0o755)
        (folder / "home").mkdir()
        (folder / "home/config.toml").write_text(
            f'[superlink]\ndefault = "{connection}"\n\n[superlink.{connection}]\naddress = "{self.address}"\n'
        )

    def __exit__(self, *why: object) -> None:
        super().__exit__(*why)
        if self.forks:
            self.forks.end()

    def configure(self, line: str) -> None:
        """One more line about the connection."""
        with open(self.folder / "home/config.toml", "a") as file:
            file.write(f"{line}\n")

    def command(self, line: str) -> Process:
        """A command as the docs have it, in the engine's folder: only ports and the app's folder are the test's."""
        program, *words = shlex.split(self.adapted(line))
        words = [str(ROOT) if word == "." else word for word in words]
        return self.start(
            program, PROGRAMS / program, *words, fresh=not self.forks, forks=self.forks, cwd=self.folder, env=self.env
        )

    def adapted(self, line: str) -> str:
        port = self.address.rpartition(":")[2]
        line = line.replace(":9092", f":{port}").replace("--port 9092", f"--port {port}")
        return re.sub(r"--port 909[4-9]", lambda _: f"--port {free_port()}", line)

    def run(self, line: str, seconds: float = 250) -> str:
        """The same, to its end; returns what it printed."""
        return self.command(line).ends(0, seconds)


def commands(readme: str, heading: str) -> list[str]:
    """The lines of the ```sh blocks under a heading."""
    section = readme.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", section, re.S) for line in block.splitlines()]
