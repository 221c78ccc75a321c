"""The entry point of `arriero` and of `python -m app`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Ctrl-C while the modules load ends the process without a word; then they see to it themselves."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # OpenBLAS, which numpy loads and nothing here uses, would start a thread for each core; see processes.forking.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # noqa: TID251 it is no setting
    from app.cli import main as command  # loaded once the signal is set

    signal.signal(signal.SIGINT, handler)
    command()


if __name__ == "__main__":
    main()
