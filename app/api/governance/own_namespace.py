"""The namespace of what a caller creates: its own, the one that it names, or that of the installation."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from app.api.callers import ListedNamespace


async def _own(namespace: ListedNamespace) -> str:
    return namespace or ""


#: The type of an endpoint's argument: the namespace of what is created or named; empty for the installation.
OwnNamespace = Annotated[str, Depends(_own)]
