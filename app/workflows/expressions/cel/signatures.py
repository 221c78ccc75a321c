"""
The signatures of the functions that Arriero adds to CEL: for the type checker, for messages and for the documentation.

Each can be called as a function and as a method: `dot(a, b)` and `a.dot(b)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cel_expr_python import cel

_DYN, _INT, _DOUBLE, _LIST = cel.Type.DYN, cel.Type.INT, cel.Type.DOUBLE, cel.Type.List(cel.Type.DYN)
_HITS = cel.Type.List(cel.Type.Map(cel.Type.STRING, cel.Type.DYN))


@dataclass(frozen=True, slots=True)
class Signature:
    """The forms of a function, each as it is written, with the types of its parameters; and the type of its result."""

    forms: Mapping[str, tuple[cel.Type, ...]]
    result: cel.Type

    def accepts(self, arguments: int) -> bool:
        """Return whether a form of the function has this number of arguments."""
        return any(len(parameters) == arguments for parameters in self.forms.values())


#: By name.
SIGNATURES: Mapping[str, Signature] = {
    "dot": Signature({"dot(a, b)": (_LIST, _LIST)}, _DOUBLE),
    "cosine": Signature({"cosine(a, b)": (_LIST, _LIST)}, _DOUBLE),
    "norm": Signature({"norm(a)": (_LIST,)}, _DOUBLE),
    "topK": Signature({"topK(scores, k)": (_LIST, _INT), "topK(vectors, query, k)": (_LIST, _LIST, _INT)}, _HITS),
    "sum": Signature({"sum(numbers)": (_LIST,)}, _DYN),
    "mean": Signature({"mean(numbers)": (_LIST,)}, _DOUBLE),
    "min": Signature({"min(list)": (_LIST,)}, _DYN),
    "max": Signature({"max(list)": (_LIST,)}, _DYN),
    "argmin": Signature({"argmin(list)": (_LIST,)}, _INT),
    "argmax": Signature({"argmax(list)": (_LIST,)}, _INT),
    "zip": Signature({"zip(a, b)": (_LIST, _LIST)}, cel.Type.List(_LIST)),
    # A macro: its second argument is the name of a variable, which the type checker must know.
    "sortBy": Signature({"list.sortBy(x, key)": (_LIST, _DYN, _DYN)}, _LIST),
    "slice": Signature({"list.slice(start, end)": (_LIST, _INT, _INT)}, _LIST),
}


def declarations() -> list[cel.FunctionDecl]:
    """Return the declarations of the functions for an environment of the library."""
    return [
        cel.FunctionDecl(
            name,
            [
                cel.Overload(
                    id=f"{name}_{len(parameters)}_{'method' if is_member else 'function'}",
                    return_type=signature.result,
                    parameters=parameters,
                    is_member=is_member,
                )
                for parameters in signature.forms.values()
                for is_member in (False, True)
            ],
        )
        for name, signature in SIGNATURES.items()
    ]
