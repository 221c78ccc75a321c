"""
As whom Postgres runs: it refuses root.

Anybody else runs it as himself. Root has two ways:
a user namespace in which root's own files belong to `nobody`, so that nothing changes hands;
or the account `nobody`, to which the directory of the data, and nothing else, is given.
Each way is tried on the real program and directory before it is chosen. When neither works, it is said why.

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

#: What the servers and the tools around them get for an environment: nothing of ours, and no secret.
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C", "TZ": "UTC"}

#: How long a trial may take, in seconds.
_TRIAL_SECONDS = 20.0
#: Runs the program ($1) in the directory ($2), as the server will.
_TRIAL = '"$1" --version >/dev/null && cd "$2"'


@dataclass(frozen=True, slots=True)
class RunAs:
    """How a program is run."""

    #: Put before its command line.
    prefix: tuple[str, ...] = ()
    #: The uid and gid it gets, where another than ours.
    account: tuple[int, int] | None = None
    #: The uid and gid that its data must belong to, where we may decide that.
    owner: tuple[int, int] | None = None


#: A way in which root may run the server. Raises `Unusable`.
Way = Callable[[], RunAs]


class Unusable(Exception):  # not an ArrieroError: it never leaves this module
    """What a way needs is not to be had on this machine."""


def in_namespace() -> RunAs:
    """In a user namespace: unprivileged inside, root's own uid outside."""
    unshare = shutil.which("unshare", path=ENVIRONMENT["PATH"])
    if unshare is None:
        raise Unusable("there is no program `unshare` (package util-linux)")
    nobody = _nobody()
    prefix = (unshare, "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}", "--")
    return RunAs(prefix=prefix, owner=(os.geteuid(), os.getegid()))


def as_nobody() -> RunAs:
    """As the account `nobody`."""
    nobody = _nobody()
    account = (nobody.pw_uid, nobody.pw_gid)
    return RunAs(account=account, owner=account)


#: Root's ways, the best first.
WAYS: tuple[tuple[str, Way], ...] = (("in a user namespace", in_namespace), ("as user nobody", as_nobody))


def choose(server: str, program: Path, directory: Path, ways: Iterable[tuple[str, Way]] = WAYS) -> RunAs:
    """
    How to run the program so that it reaches the directory.

    Raises ServerNotStarted, with what each way met, when none works.
    """
    if os.geteuid() != 0:
        return RunAs()
    refusals: list[str] = []
    for name, way in ways:
        try:
            run_as = way()
            _try(run_as, program, directory)
        except Unusable as error:
            refusals.append(f"{name}: {error}")
        else:
            return run_as
    raise ServerNotStarted(
        server,
        f"it cannot be run by root, and no other way works here ({'; '.join(refusals)}). Start arriero as another "
        "user, or allow user namespaces, or have both of these where every user may pass: the data directory "
        "(--data-dir, ARRIERO_DATA_DIR) and Python's environment",
    )


def give(path: Path, run_as: RunAs) -> None:
    """Make the directory and all in it belong to whom the program runs as. Nothing above it is touched."""
    if run_as.owner is None or not path.exists() or (path.stat().st_uid, path.stat().st_gid) == run_as.owner:
        return
    for place, directories, files in os.walk(path):
        for name in (*directories, *files):
            os.chown(Path(place) / name, *run_as.owner, follow_symlinks=False)
    os.chown(path, *run_as.owner)  # last: it tells whether the work was finished


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
