"""The options of prompt assembly, which requests of OpenAI's form and `generate` steps share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from app.workflows.language.step_work import DocumentPart

#: Most tokens of one part of a prompt.
_MOST = 1_000_000
#: A budget in tokens; 0 leaves the part out.
PartBudget = Annotated[int, Field(ge=0, le=_MOST)]


class MemoryOptions(DocumentPart):
    """What goes into the prompt beside the messages of the request. A budget that is not set is a share of the room."""

    #: Memory blocks.
    blocks: PartBudget | None = None
    #: Documents of the personal context that have to do with the last message.
    personal: PartBudget | None = None
    #: The summary of what the window no longer has.
    summary: PartBudget | None = None
    #: What was said and noted earlier and has to do with the last message.
    recalled: PartBudget | None = None
    #: The last messages of the conversation. The rest of the room, if it is not set.
    recent: PartBudget | None = None
    #: What is looked for; the last message of the user, if it is not set.
    query: Annotated[str, Field(min_length=1, max_length=4_000)] | None = None
    #: Whether the messages of the request and the answer are appended to the conversation.
    store: bool = True
