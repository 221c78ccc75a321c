"""
Expressions: the templates of steps, in a Jinja that can do no harm.

A template sees `inputs`, `steps` and `run`, plain data, and nothing else; what is not there is an error, never empty.
Those of `http` steps can name `secrets` too, one by one.
It may print, branch, loop over data and set names. It cannot define macros, include, import or count to a billion:
the number of loop turns and the length of the text are bounded.
`check` finds at submission what would fail at run time: a name that nothing has.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.kernel.errors import FailureReason, Problem, StepFailure
from app.kernel.settings import SECRET_NAME

#: Turns of all loops of one rendering.
MAX_TURNS = 1_000_000
#: Characters of one rendered text.
MAX_LENGTH = 4_000_000

_ROOTS = ("inputs", "steps")
_SECRETS = "secrets"
#: What can be asked of a step.
STEP_FIELDS = ("output", "state", "error")
_FORBIDDEN = (
    nodes.Macro,
    nodes.CallBlock,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
    nodes.Block,
)


@dataclass(frozen=True, slots=True)
class Scope:
    """What the templates of a step may name."""

    #: Names of the run's inputs.
    inputs: Collection[str]
    #: Ids of the steps that are finished when this one begins.
    steps: Collection[str]
    #: Other names: `run`, and where they are there `item` and `index`.
    more: Collection[str] = ("run",)
    #: Whether secrets can be named. Which there are, only workers know.
    secrets: bool = False
    #: Which of `inputs` and `steps` are there at all.
    roots: Collection[str] = ("inputs", "steps")
    #: What the steps are, for a message: one that is none of them is no …
    of: str = "step that this one needs, directly or through others"

    def names(self) -> str:
        """The list of names for a message."""
        names = [f"inputs.{name}" for name in self.inputs] + [f"steps.{step}.output" for step in self.steps]
        secrets = ["secrets.NAME"] if self.secrets else []
        return ", ".join([*names, *self.more, *secrets]) or "nothing: the workflow has no inputs"


def check(template: str, where: str, scope: Scope) -> list[Problem]:
    """What is wrong with a template: its syntax, a statement that is not offered, a name that nothing has."""
    try:
        tree = _ENVIRONMENT.parse(template)
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno} of the template: {error.message}"
        return [Problem(where, reason, "a Jinja template; write {{ '{{' }} for braces")]
    problems = [
        Problem(where, f"the statement {type(node).__name__.lower()!r} is not offered here", "if, for, set, filters")
        for node in tree.find_all(_FORBIDDEN)
    ]
    free = meta.find_undeclared_variables(tree)
    unknown = sorted(free - {*scope.roots, _SECRETS, *scope.more})
    if _SECRETS in free:
        problems += _secret_problems(tree, where, scope)
    problems += [Problem(where, f"{name!r} names nothing", scope.names()) for name in unknown]
    for root, name, field in _references(tree):
        if root in unknown:
            continue
        if root == "inputs" and name not in scope.inputs:
            problems.append(Problem(where, f"'inputs.{name}' names no input of the workflow", scope.names()))
        elif root == "steps" and name not in scope.steps:
            problems.append(Problem(where, f"'steps.{name}' is no {scope.of}", scope.names()))
        elif root == "steps" and field is not None and field not in STEP_FIELDS:
            accepted = ", ".join(f"steps.{name}.{known}" for known in STEP_FIELDS)
            problems.append(Problem(where, f"'steps.{name}.{field}': a step has no {field!r}", accepted))
    return problems


def secret_names(template: str) -> frozenset[str]:
    """The names of the secrets that a template uses, as it writes them. `check` has seen that it names each."""
    return frozenset(name for root, name, _ in _references(_ENVIRONMENT.parse(template)) if root == _SECRETS)


def render(template: str, data: Mapping[str, Any]) -> str:
    """
    The text of a template over `inputs` and `steps`.

    Raises StepFailure with the reason `template_error` when a name is not there, an operation fails or a bound is met.
    """
    parts, length = [], 0
    try:
        for part in _compiled(template).generate(**data, _turns=_Turns()):
            length += len(part)
            if length > MAX_LENGTH:
                raise _Bound(f"the text is longer than {MAX_LENGTH} characters")
            parts.append(part)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
        raise StepFailure(FailureReason.TEMPLATE_ERROR, f"a template cannot be rendered: {error}") from error
    return "".join(parts)


class _Bound(TemplateError):
    """A template wants too much."""


class _Turns:
    """Counts the turns of the loops of one rendering."""

    def __init__(self) -> None:
        self.left = MAX_TURNS

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.left -= 1
            if self.left < 0:
                raise _Bound(f"the loops turn more than {MAX_TURNS} times")
            yield item


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    turns: _Turns = context["_turns"]
    return turns.counted(items)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with data only: no globals, items before attributes, loops that are counted."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise _Bound(f"'{operator}' is offered for numbers only")
        if operator == "**" and (abs(right) > 64 or abs(left) > 1e9):
            raise _Bound("'**' is offered for small numbers only")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        return tree


def _as_json(value: Any, indent: int | None = None) -> str:
    """JSON as people write it: in the order that is there, in plain characters. Jinja's own is made for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise _Bound("'tojson' indents by 16 at the most")
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> _Environment:
    environment = _Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    environment.globals.clear()
    for name in ("pprint", "random", "format"):
        del environment.filters[name]
    environment.filters["_counted"] = _counted
    environment.filters["tojson"] = _as_json
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=512)
def _compiled(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)


def _secret_problems(tree: nodes.Template, where: str, scope: Scope) -> list[Problem]:
    if not scope.secrets:
        return [Problem(where, "secrets are offered to http steps only", scope.names())]
    named = [name for root, name, _ in _references(tree) if root == _SECRETS]
    mentions = [node for node in tree.find_all(nodes.Name) if node.name == _SECRETS]
    problems = [
        Problem(where, f"'secrets.{name}' is no name of a secret", "letters, digits and underscores, a letter first")
        for name in named
        if not SECRET_NAME.fullmatch(name.lower())
    ]
    if len(mentions) > len(named):
        problems.append(Problem(where, "secrets are named one by one, never taken together", "secrets.NAME"))
    return problems


def _references(tree: nodes.Template) -> Iterator[tuple[str, str, str | None]]:
    """Each `root.name` with the field that is asked of it: `('steps', 'draft', 'output')`."""
    covered: set[int] = set()
    for node in tree.find_all((nodes.Getattr, nodes.Getitem)):
        path = _path(node)
        if path is None or id(node) in covered:
            continue
        inner: nodes.Node = node
        while isinstance(inner, nodes.Getattr | nodes.Getitem):
            inner = inner.node
            covered.add(id(inner))
        yield path[0], path[1], path[2] if len(path) > 2 else None


def _path(node: nodes.Node) -> tuple[str, ...] | None:
    if isinstance(node, nodes.Name):
        return (node.name,) if node.name in (*_ROOTS, _SECRETS) and node.ctx == "load" else None
    if isinstance(node, nodes.Getattr):
        above, name = _path(node.node), node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        above, name = _path(node.node), node.arg.value
    else:
        return None
    return (*above, name) if above else None
