"""
Expressions: the templates of steps, in a Jinja that can do no harm.

A template sees `inputs`, `steps` and `run`, plain data, and nothing else; what is not there is an error, never empty.
Those of `http` steps can name `secrets` too, one by one.
It may print, branch, loop over data and set names. It cannot define macros, include, import, call methods or count to a
billion: all work is counted, and every text is bounded; see `app.workflows.expressions.filters`.
`check` finds at submission what would fail at run time: a name that nothing has.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
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

from app.kernel.errors import FailureReason, Problem, StepFailure
from app.kernel.settings import SECRET_NAME
from app.workflows.expressions import filters
from app.workflows.expressions.cel.values import is_whole
from app.workflows.expressions.filters import OverBound

#: Parts of a template: names, operators, pieces of text between them.
MAX_TOKENS = 8_000
#: Characters of an error that a message shows.
_SHOWN = 500
#: What can be asked of `loop`.
_OF_LOOPS = frozenset(
    {"index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "cycle"}
)

#: Inputs, and steps, that a message lists.
LISTED = 30
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
        """The list of names for a message, the first of them."""
        names = [f"inputs.{name}" for name in islice(self.inputs, LISTED)]
        names += [f"steps.{step}.output" for step in islice(self.steps, LISTED)]
        more = ["…"] if max(len(self.inputs), len(self.steps)) > LISTED else []
        secrets = ["secrets.NAME"] if self.secrets else []
        return ", ".join([*names, *more, *self.more, *secrets]) or "nothing: the workflow has no inputs"


def check(template: str, where: str, scope: Scope) -> list[Problem]:
    """What is wrong with a template: its syntax, a statement that is not offered, a name that nothing has."""
    try:
        tree = _ENVIRONMENT.parse(template)
        problems = [Problem(where, *refused) for refused in _refused(tree)]
        if problems:
            return problems
        free = meta.find_undeclared_variables(tree)
        _compiled(template)
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno} of the template: {error.message}"
        return [Problem(where, reason, "a Jinja template; write {{ '{{' }} for braces")]
    except (RecursionError, MemoryError, SyntaxError):
        return [Problem(where, "the template is nested too deep", "fewer loops, branches and brackets in one another")]
    except (ValueError, OverflowError):
        return [Problem(where, "the template holds a number of too many digits", "numbers that a double holds")]
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
        program = _compiled(template)
        with filters.counted():
            for part in program.generate(**data):
                length += len(part)
                if length > filters.MAX_LENGTH:
                    raise OverBound(f"the text is longer than {filters.MAX_LENGTH} characters")
                parts.append(part)
    except (RecursionError, MemoryError, SyntaxError) as error:
        message = "a template cannot be rendered: it, or a value, is nested too deep or too large"
        raise StepFailure(FailureReason.TEMPLATE_ERROR, message) from error
    except _FAULTS as error:
        message = f"a template cannot be rendered: {str(error)[:_SHOWN]}"
        raise StepFailure(FailureReason.TEMPLATE_ERROR, message) from error
    text = "".join(parts)
    if not is_whole(text):
        message = "a template cannot be rendered: the text holds half a character (a lone surrogate)"
        raise StepFailure(FailureReason.TEMPLATE_ERROR, message)
    return text


#: What operations and filters raise over values that they do not take.
_FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with data only: no globals, no attributes and methods of Python's objects, all work counted."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    intercepted_unops = frozenset({"+", "-"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, LoopContext) and attribute in _OF_LOOPS:
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
            raise OverBound("nothing can be called: there are filters")
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
        return TokenStream(_few(super()._tokenize(source, name, filename, state)), name, filename)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        counted: nodes.Template = _Counting().visit(tree)
        return counted


def _few(stream: TokenStream) -> Iterator[Token]:
    for count, token in enumerate(stream):
        if count > MAX_TOKENS:
            raise TemplateSyntaxError(f"the template has more than {MAX_TOKENS} parts", token.lineno)
        yield token


class _Counting(NodeTransformer):
    """Puts filters that count in the place of what Jinja does itself."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 Jinja's name
        weight = sum(1 for _ in node.find_all(nodes.Node)) >> 2
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_turned", nodes.Const(weight))
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802 Jinja's name
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise TemplateSyntaxError("a number is beyond what a double holds", node.lineno)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 Jinja's name
        # As a value it passes through `finalize`, where it is counted.
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 Jinja's name
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802 Jinja's name
        self.generic_visit(node)
        operations: list[nodes.Expr] = []
        for operand in node.ops:
            operations += (nodes.Const(operand.op), operand.expr)
        return _filtered(node.expr, "_compared", *operations)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802 Jinja's name
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _filtered(node.node, "_sliced", *(nodes.Const(None) if end is None else end for end in ends))


def _filtered(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        finalize=filters.written,
        optimized=False,
    )
    environment.globals.clear()
    environment.filters = {
        **filters.FILTERS,
        "_turned": filters.turned,
        "_joined": filters.joined,
        "_compared": filters.compared,
        "_sliced": filters.sliced,
    }
    environment.tests = dict(filters.TESTS)
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=512)
def _compiled(template: str) -> Template:
    tree = _ENVIRONMENT.parse(template)
    for message, accepted in _refused(tree):
        raise OverBound(f"{message}; accepted: {accepted}")
    return _ENVIRONMENT.from_string(tree)


def _refused(tree: nodes.Template) -> Iterator[tuple[str, str]]:
    """What a template holds that is not offered, and what is instead."""
    for node in tree.find_all(_FORBIDDEN):
        yield f"the statement {type(node).__name__.lower()!r} is not offered here", "if, for, set, filters"
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            yield "loops that call themselves are not offered here", "a loop without 'recursive'"
    for call in tree.find_all(nodes.Call):
        # A function is a name that nothing has; `call` refuses what else is called.
        if isinstance(call.node, nodes.Getattr) and call.node.attr != "cycle":
            name = call.node.attr
            instead = f"the filter: | {name}" if name in filters.FILTERS else "filters, such as | upper"
            yield f"the method {name!r} is called, but there are no methods here", instead


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
