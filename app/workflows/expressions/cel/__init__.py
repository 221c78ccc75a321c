"""
CEL, the Common Expression Language: a parser and an evaluator of small expressions without side effects.

Google's library (`cel-expr-python`) parses and type-checks the text. This package evaluates the parsed tree over Python
values. The library's own evaluator is not used, because of measured defects (version 0.1.3):
- Each null result drops a reference to `None` that it does not own; the process aborts after some thousand of them.
- Lists that double in nested macros bypass its iteration limit and exhaust the memory.
- A filter over 10,000 items holds the GIL for seconds.
- It loses the order of keys, and it cuts a string at the first NUL.
Functions of single values that are hard to implement (RE2 regular expressions, timestamps, conversions of strings) are
delegated to the library.

`tree` parses, `program` and `functions` evaluate. Workflows use `app.workflows.expressions.conditions`.
"""
