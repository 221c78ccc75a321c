"""
Whether text from outside would reach a step that offers tools to a model.

Whoever writes a mail could then try to have tools called. So mail goes to workflows without tools, unless the
definition says otherwise. It is checked when a definition is stored, and again before each delivery.
"""

from __future__ import annotations

from collections.abc import Iterator

from app.handoffs import check, store
from app.handoffs.connectors.email import EmailSource
from app.handoffs.connectors.routes_target import RoutesTarget
from app.handoffs.connectors.workflow_target import WorkflowTarget
from app.handoffs.definition import Handoff
from app.kernel.database import Database
from app.kernel.errors import NotFound, Problem
from app.workflows import registry
from app.workflows.language.agent import AgentFields
from app.workflows.language.definition import Definition
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.steps import CallFields, OpenAIFields, work_of

#: What would be accepted.
_ALLOW = "'allow_tools: true' in the source"
#: Most workflows that are looked at: those of the targets, and those that they call.
_MOST = 200


def problems(database: Database, namespace: str, handoff: Handoff) -> list[Problem]:
    """Return a problem for each step that would offer tools to a model that reads mail."""
    if not isinstance(handoff.source, EmailSource) or handoff.source.allow_tools:
        return []
    waiting = [one for each in _with_followers(database, namespace, handoff) for one in _workflows(each)]
    found: list[Problem] = []
    seen = set(waiting)
    while waiting and len(seen) <= _MOST:
        name, version = waiting.pop()
        try:
            definition = registry.get(database, name, version, namespace=namespace).definition
        except NotFound:
            continue  # a delivery says so
        for step, work in _work(definition):
            if why := _offers(work):
                message = f"step {step!r} of the workflow {name!r} {why}, and would read mail"
                found.append(Problem("target", message, f"a workflow without tools, or {_ALLOW}"))
            if isinstance(work, CallFields) and (work.workflow, work.version) not in seen:
                seen.add((work.workflow, work.version))
                waiting.append((work.workflow, work.version))
    if len(seen) > _MOST:
        found.append(Problem("target", f"more than {_MOST} workflows would read mail", _ALLOW))
    return found


def _with_followers(database: Database, namespace: str, handoff: Handoff) -> list[Handoff]:
    """Return a hand-off with those that get what was made of its mail. One that does not exist yet is left out."""
    found, names = [handoff], {handoff.handoff}
    for each in found:  # it grows meanwhile
        for one in each.then:
            if one.handoff in names or len(found) > _MOST:
                continue
            names.add(one.handoff)
            with database.work() as work:
                version = store.find_version(work, namespace, one.handoff)
            if version is not None:
                found.append(check.stored(version.document))
    return found


def _workflows(handoff: Handoff) -> list[tuple[str, int | None]]:
    target = handoff.target
    if isinstance(target, WorkflowTarget):
        return [(target.workflow, target.version)]
    return list(target.workflows) if isinstance(target, RoutesTarget) else []


def _work(definition: Definition) -> Iterator[tuple[str, object]]:
    """Yield what the steps of a workflow do; of a map, what it does with each item."""
    for step in definition.all_steps():
        yield step.id, work_of(step)


def _offers(work: object) -> str:
    if isinstance(work, AgentFields):
        return "is an agent"
    if isinstance(work, GenerateFields) and work.tools:
        return "offers tools to its model"
    return "does a request that can have tools" if isinstance(work, OpenAIFields) else ""
