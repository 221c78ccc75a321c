"""
Templates: the Jinja templates of steps, in a sandbox.

A template reads only plain data: `inputs`, `steps` and `run`. A missing name is an error, never an empty text.
Templates of `http` steps can also use `secrets`, each by its name.
A template can print, branch, loop over data and set variables. It cannot define macros, include, import or call
methods. Its work and the length of every text are limited; see `app.workflows.expressions.filters`.
`check` finds at submission what would fail at run time: an unknown name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, meta, nodes
from jinja2.filters import _GroupTuple
from jinja2.lexer import Token, TokenStream
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from app.json_schema.values import is_encodable
from app.kernel.errors import FailureReason, Problem, StepFailure
from app.kernel.settings import SECRET_NAME
from app.workflows.expressions import filters
from app.workflows.expressions.filters import LimitExceeded

#: Maximum tokens of a template: names, operators, pieces of text between them.
MAX_TOKENS = 8_000
#: Maximum characters of a Jinja error in a failure message.
_MAX_ERROR_TEXT = 500
#: The attributes of `loop` that a template can use.
_LOOP_ATTRIBUTES = frozenset(
    {"index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "cycle"}
)

#: Maximum number of inputs, and of steps, that a message lists.
LISTED = 30
_ROOTS = ("inputs", "steps")
_SECRETS = "secrets"
#: The fields of a step that a template can use.
STEP_FIELDS = ("output", "state", "error", "finish_reason")
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
    """The names that the templates and expressions of a step can use."""

    #: Names of the run's inputs, or a mapping from them to their JSON Schemas.
    inputs: Collection[str]
    #: Ids of the steps that have finished when this step starts.
    steps: Collection[str]
    #: Other names: `run`, and `item` and `index` in a map.
    extra: Collection[str] = ("run",)
    #: Whether secrets can be used. Only workers know which secrets exist.
    secrets: bool = False
    #: Which of `inputs` and `steps` are defined.
    roots: Collection[str] = ("inputs", "steps")
    #: Completes the message about an unknown step: "'steps.x' is not a …".
    step_description: str = "step that this one needs, directly or through others"
    #: Returns the needs of the step with one more step; empty where it cannot need that one.
    needs_with: Callable[[str], str] = lambda _: ""

    def unknown_step(self, name: str, where: str) -> Problem:
        """Return the problem of a step that cannot be used, with the `needs` that would allow it, if any."""
        needs = self.needs_with(name)
        accepted = f"{needs} in this step" if needs else self.names()
        return Problem(where, f"'steps.{name}' is not a {self.step_description}", accepted)

    def names(self) -> str:
        """Return the usable names for a message, shortened when there are many."""
        names = [f"inputs.{name}" for name in islice(self.inputs, LISTED)]
        names += [f"steps.{step}.output" for step in islice(self.steps, LISTED)]
        ellipsis = ["…"] if max(len(self.inputs), len(self.steps)) > LISTED else []
        secrets = ["secrets.NAME"] if self.secrets else []
        return ", ".join([*names, *ellipsis, *self.extra, *secrets]) or "nothing: the workflow has no inputs"


def check(template: str, where: str, scope: Scope) -> list[Problem]:
    """Return the problems of a template: syntax errors, unsupported statements, unknown names."""
    try:
        tree = _ENVIRONMENT.parse(template)
        problems = [Problem(where, *found) for found in _unsupported(tree)]
        if problems:
            return problems
        free = meta.find_undeclared_variables(tree)
        _compiled(template)
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno} of the template: {error.message}"
        return [Problem(where, reason, "a Jinja template; write {{ '{{' }} for braces")]
    except (RecursionError, MemoryError, SyntaxError):
        return [Problem(where, "the template is nested too deep", "fewer nested loops, branches and brackets")]
    except (ValueError, OverflowError):
        return [Problem(where, "a number in the template has too many digits", "numbers in the range of a double")]
    unknown = sorted(free - {*scope.roots, _SECRETS, *scope.extra})
    if _SECRETS in free:
        problems += _secret_problems(tree, where, scope)
    problems += [Problem(where, f"{name!r} is not defined here", scope.names()) for name in unknown]
    for root, name, field in _references(tree):
        if root in unknown:
            continue
        if root == "inputs" and name not in scope.inputs:
            problems.append(Problem(where, f"'inputs.{name}' is not an input of the workflow", scope.names()))
        elif root == "steps" and name not in scope.steps:
            problems.append(scope.unknown_step(name, where))
        elif root == "steps" and field is not None and field not in STEP_FIELDS:
            accepted = ", ".join(f"steps.{name}.{known}" for known in STEP_FIELDS)
            problems.append(Problem(where, f"'steps.{name}.{field}': a step has no {field!r}", accepted))
    return problems


def secret_names(template: str) -> frozenset[str]:
    """Return the names of the secrets in a template, as written. The template must have passed `check`."""
    return frozenset(name for root, name, _ in _references(_ENVIRONMENT.parse(template)) if root == _SECRETS)


def render(template: str, data: Mapping[str, Any]) -> str:
    """
    Return the text of a template, rendered over `data`.

    Raises StepFailure with the reason `template_error` when a name is missing, an operation fails or a limit is
    exceeded.
    """
    parts, length = [], 0
    try:
        program = _compiled(template)
        with filters.budgeted():
            for part in program.generate(**data):
                length += len(part)
                if length > filters.MAX_LENGTH:
                    raise LimitExceeded(f"the text is longer than {filters.MAX_LENGTH} characters")
                parts.append(part)
    except (RecursionError, MemoryError, SyntaxError) as error:
        message = "a template cannot be rendered: it, or a value, is nested too deep or is too large"
        raise StepFailure(FailureReason.TEMPLATE_ERROR, message) from error
    except _RENDER_ERRORS as error:
        message = f"a template cannot be rendered: {str(error)[:_MAX_ERROR_TEXT]}"
        raise StepFailure(FailureReason.TEMPLATE_ERROR, message) from error
    text = "".join(parts)
    if not is_encodable(text):
        message = "a template cannot be rendered: the text contains a lone surrogate"
        raise StepFailure(FailureReason.TEMPLATE_ERROR, message)
    return text


#: The exceptions that operations and filters raise for unsupported values.
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError)


class _Environment(ImmutableSandboxedEnvironment):
    """A Jinja environment over plain data: no globals, no Python attributes or methods, all work counted."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    intercepted_unops = frozenset({"+", "-"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, LoopContext) and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        if isinstance(obj, _GroupTuple) and attribute in obj._fields:
            return getattr(obj, attribute)
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Undefined):
            return obj[argument]
        if isinstance(obj, str | list | tuple | Mapping):
            try:
                return obj[argument]
            except (TypeError, LookupError):
                pass
        return self.undefined(obj=obj, name=argument)

    def call(self, _: Context, obj: Any, *arguments: Any, **named: Any) -> Any:
        if getattr(obj, "__func__", None) is not LoopContext.cycle:
            raise LimitExceeded("functions cannot be called: use filters")
        named.pop("_loop_vars", None)
        named.pop("_block_vars", None)
        return obj(*arguments, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        calculate = super().call_binop
        return filters.calculated(operator, lambda: calculate(context, operator, left, right), left, right)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        calculate = super().call_unop
        return filters.calculated(operator, lambda: calculate(context, operator, arg), arg)

    def _tokenize(
        self, source: str, name: str | None, filename: str | None = None, state: str | None = None
    ) -> TokenStream:
        return TokenStream(_limited(super()._tokenize(source, name, filename, state)), name, filename)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        counted: nodes.Template = _BudgetInstrumenter().visit(tree)
        return counted


def _limited(stream: TokenStream) -> Iterator[Token]:
    for count, token in enumerate(stream):
        if count > MAX_TOKENS:
            raise TemplateSyntaxError(f"the template has more than {MAX_TOKENS} tokens", token.lineno)
        yield token


class _BudgetInstrumenter(NodeTransformer):
    """Replaces Jinja's built-in operations by filters that count their work."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 Jinja's name
        weight = sum(1 for _ in node.find_all(nodes.Node)) >> 2
        self.generic_visit(node)
        node.iter = _filter_call(node.iter, "_counted_iteration", nodes.Const(weight))
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802 Jinja's name
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise TemplateSyntaxError("a number is beyond the range of a double", node.lineno)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 Jinja's name
        # Jinja passes a constant through `finalize`, which counts it.
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 Jinja's name
        self.generic_visit(node)
        return _filter_call(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802 Jinja's name
        self.generic_visit(node)
        operations: list[nodes.Expr] = []
        for operand in node.ops:
            operations += (nodes.Const(operand.op), operand.expr)
        return _filter_call(node.expr, "_compared", *operations)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802 Jinja's name
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter_call(node.node, "_sliced", *(nodes.Const(None) if end is None else end for end in ends))


def _filter_call(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        finalize=filters.finalized,
        optimized=False,
    )
    environment.globals.clear()
    environment.filters = {
        **filters.FILTERS,
        "_counted_iteration": filters.counted_iteration,
        "_concatenated": filters.concatenated,
        "_compared": filters.compared,
        "_sliced": filters.sliced,
    }
    environment.tests = dict(filters.TESTS)
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=512)
def _compiled(template: str) -> Template:
    tree = _ENVIRONMENT.parse(template)
    for message, accepted in _unsupported(tree):
        raise LimitExceeded(f"{message}; accepted: {accepted}")
    return _ENVIRONMENT.from_string(tree)


def _unsupported(tree: nodes.Template) -> Iterator[tuple[str, str]]:
    """Yield a message for each unsupported part of a template, and the supported alternative."""
    for node in tree.find_all(_FORBIDDEN):
        yield f"the statement {type(node).__name__.lower()!r} is not supported here", "if, for, set, filters"
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            yield "recursive loops are not supported here", "a loop without 'recursive'"
    for call in tree.find_all(nodes.Call):
        # A called function is an unknown name, which `check` reports; `_Environment.call` rejects all other calls.
        if isinstance(call.node, nodes.Getattr) and call.node.attr != "cycle":
            name = call.node.attr
            instead = f"the filter: | {name}" if name in filters.FILTERS else "filters, such as | upper"
            yield f"the method {name!r} is called, but methods are not supported here", instead


def _secret_problems(tree: nodes.Template, where: str, scope: Scope) -> list[Problem]:
    if not scope.secrets:
        return [Problem(where, "secrets can be used in http steps only", scope.names())]
    named = [name for root, name, _ in _references(tree) if root == _SECRETS]
    mentions = [node for node in tree.find_all(nodes.Name) if node.name == _SECRETS]
    problems = [
        Problem(where, f"'secrets.{name}' is not a secret name", "letters, digits and underscores, a letter first")
        for name in named
        if not SECRET_NAME.fullmatch(name.lower())
    ]
    if len(mentions) > len(named):
        problems.append(
            Problem(where, "'secrets' cannot be used as a whole, only one secret by its name", "secrets.NAME")
        )
    return problems


def _references(tree: nodes.Template) -> Iterator[tuple[str, str, str | None]]:
    """Yield each `root.name` of a template with the field selected from it: `('steps', 'draft', 'output')`."""
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
