"""
A memory block: a short labelled text that models and people edit, and that prompts contain.

A label never changes, and a value never has more characters than the block's limit.
Each change of the value, the description or the limit is a version, with its author; versions are never rewritten.
A block is attached to conversations, agents, users or the whole namespace. Of two blocks with one label, the one that
is attached to the narrowest of them counts.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from app.kernel.errors import Conflict, InvalidInput, Problem

#: The prefix of the ids of blocks; 32 hexadecimal digits follow.
PREFIX = "block_"
#: Characters of a value: unless the block has another limit, and at most.
DEFAULT_LIMIT, MAX_LIMIT = 2_000, 20_000
#: Most characters of a description, of a label, and of the name of what a block is attached to.
MAX_DESCRIPTION, MAX_LABEL, MAX_TARGET = 500, 64, 200

_LABEL = re.compile(r"[a-z0-9][a-z0-9._/-]{0,63}", re.ASCII)
#: What error messages say is accepted.
LABEL_ACCEPTED = f"lower-case letters, digits, '.', '_', '-', '/'; at most {MAX_LABEL}, the first a letter or digit"
#: NUL and lone surrogates cannot be stored; other control characters have no place in a prompt.
_NOT_A_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class BlockTargetKind(StrEnum):
    """What a block is attached to, the narrowest first."""

    CONVERSATION = "conversation"
    AGENT = "agent"
    USER = "user"
    NAMESPACE = "namespace"


class BlockAuthorKind(StrEnum):
    """Who wrote a version."""

    #: A caller of the API.
    CALLER = "caller"
    #: A model, with a tool.
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class BlockTarget:
    """Something that a block is attached to."""

    kind: BlockTargetKind
    #: The id of a conversation, the name of a user or an agent; empty for the namespace.
    name: str = ""


@dataclass(frozen=True, slots=True)
class BlockAuthor:
    """Who wrote a version."""

    kind: BlockAuthorKind
    #: The name of the caller's key, or of the model.
    name: str
    #: The run and the step in which a model wrote it.
    run_id: str | None = None
    step: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A block, as it is now."""

    id: str
    namespace: str
    label: str
    description: str
    value: str
    #: Most characters of the value.
    limit: int
    #: Models cannot edit it.
    read_only: bool
    #: The number of its newest version, from 1.
    version: int
    #: Since when it is in no prompt, but found by searches; None while it is in context.
    archived_at: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class BlockVersion:
    """What a block was after one change."""

    version: int
    value: str
    description: str
    limit: int
    author: BlockAuthor
    #: What made it: `create`, `edit`, `rollback to 3`, or the name of a tool.
    operation: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block to be created. Raises InvalidInput, with every problem, when it is not valid."""

    label: str
    value: str = ""
    description: str = ""
    limit: int = DEFAULT_LIMIT
    read_only: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        problems = [*label_problems(self.label), *text_problems(self.value, self.description, self.limit)]
        if problems:
            raise InvalidInput(problems, "block")


@dataclass(frozen=True, slots=True)
class BlockChange:
    """Changes of a block: what is None stays. `read_only` is no part of a version."""

    value: str | None = None
    description: str | None = None
    limit: int | None = None
    read_only: bool | None = None

    @property
    def makes_version(self) -> bool:
        """Whether it changes what versions have."""
        return not (self.value is None and self.description is None and self.limit is None)


@dataclass(frozen=True, slots=True)
class BlockScope:
    """For whom a prompt is made, or a tool called: the blocks that are attached to any of these count."""

    namespace: str
    user: str | None = None
    #: The public id of the conversation.
    conversation: str | None = None
    agent: str | None = None

    def targets(self) -> tuple[BlockTarget, ...]:
        """Return what blocks can be attached to here, the narrowest first."""
        named = (
            (BlockTargetKind.CONVERSATION, self.conversation),
            (BlockTargetKind.AGENT, self.agent),
            (BlockTargetKind.USER, self.user),
            (BlockTargetKind.NAMESPACE, ""),
        )
        return tuple(BlockTarget(kind, name) for kind, name in named if name is not None)

    def home(self) -> BlockTarget:
        """Return what a block that a model creates is attached to: the user, or else what is nearest."""
        found = {target.kind: target for target in self.targets()}
        return found.get(BlockTargetKind.USER) or self.targets()[0]


@dataclass(frozen=True, slots=True)
class AttachedBlock:
    """A block of a scope, with what it is attached to there."""

    block: Block
    target: BlockTarget = field(default_factory=lambda: BlockTarget(BlockTargetKind.NAMESPACE))


class BlockChanged(Conflict):
    """The block has another version than the one that the change is based on."""

    def __init__(self, label: str, expected: int, current: int) -> None:
        self.label, self.expected, self.current = label, expected, current
        super().__init__(
            f"the block {label!r} is at version {current}, and the change is based on version {expected}; "
            "read it again and repeat the change"
        )


class LabelTaken(Conflict):
    """Another block with the label is attached to the same thing."""

    def __init__(self, label: str, target: BlockTarget, other: str, *, archived: bool) -> None:
        self.label, self.target, self.other, self.archived = label, target, other, archived
        state = "archived block" if archived else "block"
        super().__init__(
            f"the {state} {other} with the label {label!r} is attached to {shown_target(target)}; "
            "use another label, or detach that one"
        )


class TooManyBlocks(Conflict):
    """A namespace, or what blocks are attached to, has as many as it may."""


def label_problems(label: str, where: str = "label") -> list[Problem]:
    """Return what is wrong with a label."""
    if _LABEL.fullmatch(label):
        return []
    return [Problem(where, f"{label[: MAX_LABEL + 1]!r} is not a valid label", LABEL_ACCEPTED)]


def text_problems(value: str, description: str, limit: int) -> list[Problem]:
    """Return what is wrong with the texts of a block and its limit."""
    found = []
    if not 1 <= limit <= MAX_LIMIT:
        found.append(Problem("limit", f"{limit} characters are not accepted", f"1 to {MAX_LIMIT}"))
    elif len(value) > limit:
        message = f"it has {len(value)} characters, {len(value) - limit} more than the limit of the block"
        found.append(Problem("value", message, f"at most {limit} characters, or a higher limit"))
    if len(description) > MAX_DESCRIPTION:
        found.append(Problem("description", f"it has {len(description)} characters", f"at most {MAX_DESCRIPTION}"))
    for where, text in (("value", value), ("description", description)):
        if match := _NOT_A_TEXT.search(text):
            message = f"the character U+{ord(match[0]):04X} at {match.start()} is no text"
            found.append(Problem(where, message, "text without control characters"))
    return found


def target_problems(target: BlockTarget) -> list[Problem]:
    """Return what is wrong with something that a block shall be attached to."""
    if target.kind is BlockTargetKind.NAMESPACE:
        if target.name:
            return [Problem("namespace", "a block is attached to its own namespace only", "true")]
        return []
    if not 1 <= len(target.name) <= MAX_TARGET or _NOT_A_TEXT.search(target.name):
        return [Problem(target.kind.value, "this cannot be its name", f"1 to {MAX_TARGET} characters")]
    return []


def shown_target(target: BlockTarget) -> str:
    """Return what a block is attached to, for a message."""
    return "the namespace" if target.kind is BlockTargetKind.NAMESPACE else f"the {target.kind} {target.name!r}"


def nearest(found: Sequence[AttachedBlock]) -> list[AttachedBlock]:
    """Return one block for each label, in the order of labels: the one that is attached to the narrowest target."""
    rank = {kind: at for at, kind in enumerate(BlockTargetKind)}
    chosen: dict[str, AttachedBlock] = {}
    for one in sorted(found, key=lambda one: rank[one.target.kind]):
        chosen.setdefault(one.block.label, one)
    return [chosen[label] for label in sorted(chosen)]
