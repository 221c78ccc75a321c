"""GBNF of users: what is sound is written anew with the same meaning; what llama.cpp would choke on is refused."""

from __future__ import annotations

import pytest

from app.grammar import gbnf_source
from app.kernel.errors import InvalidInput

SOUND = {
    "alternatives": ('root ::= "yes" | "no"', 'root ::= "yes" | "no"\n'),
    "comments and lines": ('# x\nroot ::= # y\n  "a" |\n  "b"\n\n', 'root ::= "a" | "b"\n'),
    "no space": ('root::="a"\r\n', 'root ::= "a"\n'),
    "groups": ('root ::= ("a" | "b")+ [0-9]{2} .{1,3}', 'root ::= ("a" | "b")+ [0-9]{2} .{1,3}\n'),
    "repeated groups": ('root ::= (("a"?)*){2,}', 'root ::= (("a"?)*){2,}\n'),
    "unused rules": ('root ::= a\na ::= "x"\nb ::= "y"', 'root ::= a\na ::= "x"\n'),
    "a list": ('root ::= item more\nmore ::= "," item more | ""\nitem ::= [a-z]+', None),
    "itself at the end": ('root ::= "a" root | "b"', 'root ::= "a" root | "b"\n'),
    "escapes": ('root ::= "\\n\\"\\\\\\x41\\u00e9\\U0001F600" [^\\]\\n]', None),
    "a group over lines": ('root ::= (\n  "a"\n  | "b"\n)', 'root ::= "a" | "b"\n'),
    "nothing": ("root ::= ", 'root ::= ""\n'),
    "500 labels": ("root ::= " + " | ".join(f'"label {n}"' for n in range(500)), None),
    "a long text": ("root ::= [a-z]{0,1999}", None),
}
REFUSED = {
    "no root": ('a ::= "x"', "no rule named root"),
    "undefined": ("root ::= a", "'a' is not defined"),
    "twice": ('root ::= "a"\nroot ::= "b"', "defined twice"),
    "brackets": ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested more than 50"),
    "an open bracket": ('root ::= ("a"', "at 'its end'"),
    "an open text": ('root ::= "a', "a text in quotes"),
    "a wrong escape": ('root ::= "\\q"', "valid escapes"),
    "an empty class": ("root ::= []", "characters in"),
    "half a character": ('root ::= "\\ud800"', "no character"),
    "beyond Unicode": ('root ::= "\\U00110000"', "no character"),
    "a token": ("root ::= <think>", "line 1"),
    "backwards": ('root ::= "a"{3,1}', "{3,1}"),
    "too often": ('root ::= "a"{2000}', "{2000}"),
    "far too often": ('root ::= "a"{0,99999999999999999999}', "line 1"),
    "no number": ('root ::= "a"{}', "line 1"),
    "nothing to repeat": ("root ::= *", "line 1"),
    "repeated twice": ('root ::= "a"**', "one repetition"),
    "left recursion": ('root ::= root "a" | "b"', "'root'"),
    "hidden left recursion": ('root ::= a* root | "b"\na ::= "c"?', "'root'"),
    "hidden behind nothing": ('root ::= a root | "b"\na ::= ""', "begin with themselves"),
    "nesting": ('root ::= "(" root ")" | "x"', "before the end of an alternative"),
    "exponential nesting": ('root ::= "a" root "b" | "a" root "c" | "a"', "before the end"),
    "mutual nesting": ('root ::= "(" a "x"\na ::= "y" root | "z"', "before the end"),
    "exponential ways": (
        "root ::= r0\n" + "\n".join(f"r{n} ::= r{n + 1} r{n + 1} | r{n + 1}" for n in range(40)) + '\nr40 ::= "a"',
        "ways to a first character",
    ),
    "exponential ways without recursion": (
        "root ::= r0\n"
        + "\n".join(f'r{n} ::= "a" r{n + 1} "b" | "a" r{n + 1} "c"' for n in range(40))
        + '\nr40 ::= "a"',
        "open at the same time",
    ),
    "many alternatives": ("root ::= " + " | ".join(f'"{n}" root' for n in range(2_000)), "open at the same time"),
    "products": ('root ::= (("a"{1000} "b"){1000}){1000}', "with all repetitions"),
    "ambiguous repetition": ('root ::= ("a" | "aa"){1999}', "open at the same time"),
    "length": ('root ::= "' + "a" * 60_000 + '"', "characters"),
    "rules": ("\n".join(f'r{n} ::= "a"' for n in range(1_100)), "1000 rules"),
    "exponential ways at the end": (
        "root ::= r0\n" + "\n".join(f"r{n} ::= r{n + 1} | r{n + 1}" for n in range(40)) + '\nr40 ::= "a"',
        "ways to a first character",
    ),
    "a long chain": (
        "root ::= r0 r0\n" + "\n".join(f'r{n} ::= r{n + 1} "x"' for n in range(900)) + '\nr900 ::= "a"',
        "chain that is too long",
    ),
    "NUL": ('root ::= "\\u0000"', "no character"),
}


@pytest.mark.parametrize(("source", "written"), SOUND.values(), ids=SOUND)
def test_what_is_sound_is_written_anew(source: str, written: str | None) -> None:
    found = gbnf_source.checked(source)
    assert written in (None, found)
    assert gbnf_source.checked(found) == found, "writing it again changes nothing"


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_what_an_engine_would_choke_on_is_refused(source: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        gbnf_source.checked(source)
    assert message in str(caught.value)
