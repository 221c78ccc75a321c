"""
`arriero` without its start: a server that has loaded the commands forks for each call, so that a test can make many.

The client sends its arguments, folder, environment and standard streams, and ends with the exit code of the command.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from app import cli

#: The client: it imports as little as it can.
CLIENT = """\
#!{python} -IS
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    server.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    server.sendall(call)
    server.shutdown(socket.SHUT_WR)
    sys.exit((server.recv(1) or b"\\xff")[0])
"""


def main(address: str, options: list[str]) -> None:
    """Serve until the end of standard input's process, or a signal. `options` stand before each call's arguments."""
    for command in cli.COMMANDS.values():
        importlib.import_module(command.where.partition(":")[0])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(16)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _run(connection, options)
            connection.close()


def _run(connection: socket.socket, options: list[str]) -> None:
    _, ancillary, *_ = connection.recvmsg(1, socket.CMSG_SPACE(12))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    call = b"".join(iter(lambda: connection.recv(65_536), b""))
    arguments, folder, environment = json.loads(call)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.argv = ["arriero", *options, *arguments]
    code: object = 1
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        connection.sendall(bytes([code if isinstance(code, int) else int(code is not None)]))
        os._exit(0)


def write_client(path: Path, address: Path) -> None:
    """Write the command."""
    path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
