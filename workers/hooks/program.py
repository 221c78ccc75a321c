"""
The program that calls one Python hook, in a child process: a line of JSON for each call, and one for each answer.

Its argument is the name of an entry point of the group `arriero.hooks`: a function of one dictionary that returns one,
or None. It is code of the installation, and trusted as such: the process has the rights of the worker, and is no
sandbox. It ends with its worker.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from importlib import metadata
from typing import Any

from workers.hooks.processes import GROUP


def main() -> None:
    """Answer `{"ready": true}` once the hook is loaded, then each line."""
    (name,) = sys.argv[1:]
    # What the hook prints must not be taken for an answer.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def send(answer: Any) -> None:
        channel.write(json.dumps(answer, allow_nan=False) + "\n")

    found = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    if not found:
        known = ", ".join(sorted({point.name for point in metadata.entry_points(group=GROUP)})) or "none"
        send({"raised": f"no installed package has the entry point {name!r} of the group {GROUP} (there are: {known})"})
        return
    try:
        hook = found[0].load()
    except Exception as error:  # noqa: BLE001 whatever a package raises when it is imported
        send({"raised": f"it cannot be imported: {type(error).__name__}"})
        return
    send({"ready": True})
    for line in sys.stdin:
        try:
            send({"answer": hook(json.loads(line))})
        except Exception as error:  # noqa: BLE001 whatever the hook raises; its message may quote the prompt
            send({"raised": f"it raised {type(error).__name__}"})


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


if __name__ == "__main__":
    main()
