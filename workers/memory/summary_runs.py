"""The runs that summarise conversations: submitted after a turn that has made its window fairly full."""

from __future__ import annotations

from uuid import UUID

from app.access import namespaces
from app.files.file import shown_id
from app.kernel import log
from app.kernel.errors import ArrieroError
from app.memory.assembly.plan import AssemblyPlan
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.service import Conversations, shown_conversation
from app.memory.summaries import due
from app.memory.summaries.summary import SUMMARY_PREFIX
from app.workflows.runs.submission import Submission
from workers.runtime import Runtime

_log = log.get(__name__)


def submit_if_due(
    runtime: Runtime, conversation: StoredConversation, model: str, plan: AssemblyPlan, written: int
) -> UUID | None:
    """
    Submit the run of a summary if one is due; returns its id. `written` are the tokens of the answer.

    It never raises: a conversation goes on without a summary.
    """
    number = due.due_try(due.fill(plan, written))
    definition = None if number is None else due.definition_for(plan, model)
    if number is None or definition is None:
        return None
    shown = shown_conversation(conversation.id)
    submission = Submission(
        definition,
        {"conversation": shown},
        priority="batch",
        labels={namespaces.LABEL: conversation.namespace, "conversation": shown},
        id=due.run_id(conversation.id, conversation.revision, model, plan.window.first_seq, number),
        is_routed=True,
    )
    try:
        conversations = Conversations(runtime.runs.database, runtime.settings.conversations)
        assert submission.id is not None, "it is that of the try"
        conversations.link_run(conversation.id, submission.id)
        return runtime.runs.submit(submission).id
    except ArrieroError as error:
        _log.warning("summary_not_submitted", conversation=shown, error=str(error))
        return None


def shown_summary(id_: UUID) -> str:
    """The id of a summary as runs show it."""
    return shown_id(id_, SUMMARY_PREFIX)
