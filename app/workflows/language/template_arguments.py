"""Variables that a request gives to a chat template, such as `enable_thinking`: few, short, and of simple types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, StrictInt

from app.kernel.security import texts

#: OpenAI's levels. With `none` and `minimal` a model that has a switch does not think.
ReasoningLevel = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

#: Variables that each prompt sets itself, and the functions of templates.
_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "strftime_now")
_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_]{0,63}\Z")
#: The largest whole number that JSON keeps.
_LARGEST = 2**53


def _checked(given: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in given.items():
        if name in _RESERVED or not _NAME.match(name):
            raise ValueError(
                f"{name[:40]!r} cannot be set; accepted are names of up to 64 letters, digits and _ that a template "
                f"uses, such as enable_thinking, except {', '.join(_RESERVED)}"
            )
        if isinstance(value, str) and texts.storable(value) != value:
            raise ValueError(f"the text of {name!r} holds NUL or half a character, which cannot be stored")
    return given


_Number = Annotated[StrictInt, Field(ge=-_LARGEST, le=_LARGEST)]
_Decimal = Annotated[StrictFloat, Field(allow_inf_nan=False, ge=-_LARGEST, le=_LARGEST)]
#: By name, the value.
TemplateArguments = Annotated[
    dict[str, StrictBool | _Number | _Decimal | Annotated[str, Field(max_length=1_000)]],
    Field(max_length=16),
    AfterValidator(_checked),
]
