"""
The account under which Postgres runs when Arriero is started by root, because Postgres refuses to run as root.

Other users run it under their own account. For root there are two methods:
a user namespace, in which files of root appear to belong to `nobody`, so that no owner changes;
or the account `nobody`, which becomes the owner of the data directory and of nothing else.
Each method is tried with the real program and directory before it is chosen. When none works, the error says why.

No mode of any directory is changed here.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.kernel.errors import ServerNotStarted

#: The environment of the servers and their tools: nothing is inherited, and it contains no secret.
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C", "TZ": "UTC"}

#: Timeout of a trial in seconds.
_TRIAL_SECONDS = 20.0
#: Runs the program ($1), and enters the directory ($2), under the account of the server.
_TRIAL = '"$1" --version >/dev/null && cd "$2"'


@dataclass(frozen=True, slots=True)
class RunAs:
    """How a program is started under another account."""

    #: Prefix of its command line.
    prefix: tuple[str, ...] = ()
    #: The uid and gid of the process; None for those of this process.
    account: tuple[int, int] | None = None
    #: The uid and gid that must own its data; None when the owner cannot be changed.
    owner: tuple[int, int] | None = None


#: A method by which root can run the server. Raises `Unusable`.
Method = Callable[[], RunAs]


class Unusable(Exception):  # not an ArrieroError: it never leaves this module
    """The method does not work on this machine."""


def in_namespace() -> RunAs:
    """Return how to run in a user namespace: unprivileged inside, root outside."""
    unshare = shutil.which("unshare", path=ENVIRONMENT["PATH"])
    if unshare is None:
        raise Unusable("there is no program `unshare` (package util-linux)")
    nobody = _nobody()
    prefix = (unshare, "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}", "--")
    return RunAs(prefix=prefix, owner=(os.geteuid(), os.getegid()))


def as_nobody() -> RunAs:
    """Return how to run under the account `nobody`."""
    nobody = _nobody()
    account = (nobody.pw_uid, nobody.pw_gid)
    return RunAs(account=account, owner=account)


#: Root's methods, the best first.
METHODS: tuple[tuple[str, Method], ...] = (("in a user namespace", in_namespace), ("as user nobody", as_nobody))


def choose(server: str, program: Path, directory: Path, methods: Iterable[tuple[str, Method]] = METHODS) -> RunAs:
    """
    Return how to run the program so that it can access the directory.

    Raises ServerNotStarted with the reason of each method when none works.
    """
    if os.geteuid() != 0:
        return RunAs()
    refusals: list[str] = []
    for name, method in methods:
        try:
            run_as = method()
            _try(run_as, program, directory)
        except Unusable as error:
            refusals.append(f"{name}: {error}")
        else:
            return run_as
    raise ServerNotStarted(
        server,
        f"it cannot run as root, and no other method works here ({'; '.join(refusals)}). Start arriero as another "
        "user, or allow user namespaces, or make these two reachable for every user: the data directory "
        "(--data-dir, ARRIERO_DATA_DIR) and Python's environment",
    )


def change_owner(path: Path, run_as: RunAs) -> None:
    """Change the owner of the directory and of everything in it to the account of the program, where it has one."""
    if run_as.owner is None or not path.exists() or (path.stat().st_uid, path.stat().st_gid) == run_as.owner:
        return
    for place, directories, files in os.walk(path):
        for name in (*directories, *files):
            os.chown(Path(place) / name, *run_as.owner, follow_symlinks=False)
    os.chown(path, *run_as.owner)  # last: it marks that the change is complete


def _try(run_as: RunAs, program: Path, directory: Path) -> None:
    uid, gid = run_as.account or (None, None)
    command: Sequence[str] = (*run_as.prefix, "/bin/sh", "-c", _TRIAL, "trial", str(program), str(directory))
    try:
        result = subprocess.run(
            command,
            env=ENVIRONMENT,
            user=uid,
            group=gid,
            extra_groups=None if run_as.account is None else (),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TRIAL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unusable(str(error)) from error
    if result.returncode != 0:
        raise Unusable(result.stderr.decode(errors="replace").strip() or f"status {result.returncode}")


def _nobody() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise Unusable("there is no account `nobody`") from None
