"""The types of result that a field of a workflow can require of an expression."""

from __future__ import annotations

from typing import Literal

#: A `time` is an instant: a timestamp, or a string such as `2026-11-21T09:00:00Z`. `any` is any JSON value.
ResultType = Literal["bool", "string", "list", "time", "any"]
