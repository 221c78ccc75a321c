"""`python -m app.cli`: the `arriero` command without its console script, for children of a process tree."""

from __future__ import annotations

from app.cli import main

main()
