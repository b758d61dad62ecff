"""Hosts of a test's own on this machine: network namespaces with addresses, on a switch that can cut each one off."""

import itertools
import os
import shutil
import subprocess

NUMBERS = itertools.count()


class NoHosts(Exception):
    """This machine gives no network namespaces; the text is the reason."""


class Host:
    """One machine of the network. Commands with its prefix run on it, and see its interfaces and no others."""

    def __init__(self, namespace: str, address: str, switch: str, port: str):
        self.namespace = namespace
        self.address = address
        self.switch = switch  # the namespace of the switch
        self.port = port  # of the switch, to which this host is connected
        self.prefix = ["ip", "netns", "exec", namespace]

    def cut(self) -> None:
        """From now on packets are lost at the switch: the interfaces stay up, and neither end is told."""
        _ip("-n", self.switch, "link", "set", self.port, "nomaster")

    def restore(self) -> None:
        _ip("-n", self.switch, "link", "set", self.port, "master", "switch")


class Hosts:
    """So many hosts with the addresses 10.77.0.1 and on; a context manager that removes what it made, and nothing else.

    All of it, the switch too, lies in namespaces named after this process: the machine's own network is
    never touched, and tests side by side don't meet. Raises NoHosts where the machine does not allow it.
    """

    def __init__(self, number: int):
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            raise NoHosts("network namespaces need root")
        if not shutil.which("ip"):
            raise NoHosts("no ip here (Debian's iproute2)")
        self._name = f"federation-{os.getpid()}-{next(NUMBERS)}"
        self._switch = f"{self._name}-switch"
        self._made: list[str] = []
        self._number = number

    def __enter__(self) -> list[Host]:
        try:
            self._add(self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            return [self._connect(number) for number in range(1, self._number + 1)]
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise NoHosts(f"no network namespaces here ({error.stderr.strip()})") from None

    def __exit__(self, *_: object) -> None:
        for namespace in reversed(self._made):
            _ip("netns", "delete", namespace)

    def _add(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._made.append(namespace)

    def _connect(self, number: int) -> Host:
        host = Host(f"{self._name}-{number}", f"10.77.0.{number}", self._switch, f"port{number}")
        self._add(host.namespace)
        link = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("-n", self._switch, "link", "add", host.port, *link)
        _ip("-n", self._switch, "link", "set", host.port, "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", host.namespace, "link", "set", interface, "up")
        host.restore()
        return host


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
