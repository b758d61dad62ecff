"""What fork_server.py installs as `python`: has the fork server run the program, and stands for it until its end."""

import marshal
import os
import signal
import socket
import sys

words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.path.join(os.path.dirname(__file__), "socket"))
    content = marshal.dumps((words, os.getcwd(), dict(os.environ)))
    socket.send_fds(connection, [len(content).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(content)
    pid = int.from_bytes(connection.recv(4), "big")
    if not pid:  # it needs an ordinary start
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int.from_bytes(connection.recv(4), "big", signed=True)
if code < 0:  # of a signal, as ours then
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
