"""The entry point of `arriero` and of `python -m app`."""

from __future__ import annotations

import signal


def main() -> None:
    """Ctrl-C while the modules load ends the process without a word; then they see to it themselves."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from app.cli import main as command  # loaded once the signal is set

    signal.signal(signal.SIGINT, handler)
    command()


if __name__ == "__main__":
    main()
