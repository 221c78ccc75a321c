"""What the headers of a call ask for: of the response cache, and until when it must begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from app.api.cache.answers import Answers


@dataclass(frozen=True, slots=True)
class CallOptions:
    """The headers of a call, and the cached answers."""

    #: None: nothing is cached.
    answers: Answers | None
    cache_control: str | None = None
    prefer: str | None = None


async def _of_request(
    request: Request,
    cache_control: Annotated[
        str | None,
        Header(description="`max-age=N`: a cached answer will do; `no-cache`: a new one; `no-store`: keep none"),
    ] = None,
    prefer: Annotated[
        str | None, Header(description="`wait=N`: 503 when the model does not begin within N seconds")
    ] = None,
) -> CallOptions:
    return CallOptions(request.app.state.answers, cache_control, prefer)


#: The type of an endpoint's argument that receives the options.
InjectedOptions = Annotated[CallOptions, Depends(_of_request)]
