"""
CEL, the Common Expression Language: small expressions over plain data, without side effects and without loops of
their own.

Google's parser and type checker (`cel-expr-python`) read the text; what it then gives is worked out here, by Python
over Python's values. Their evaluator is not used, for what was measured of it (0.1.3): a result of null takes a
reference from `None` that nobody gave, and after some thousand of them the process aborts; lists that double in nested
macros pass its iteration budget and take all memory; a filter of 10,000 items holds the interpreter's lock for
seconds; the order of keys is lost, and a text ends at its first NUL. Functions of single values that are hard to get
right (regular expressions by RE2, timestamps, conversions of texts) are its own.

`tree` reads, `functions` and `program` work out, `app.workflows.expressions.conditions` is what the workflows use.
"""
