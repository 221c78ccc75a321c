"""
JSON Schemas of users (draft 2020-12): whether a document is a schema, and whether a value conforms to one.

Nothing is fetched and nothing is opened: a reference names a place in the schema itself, or the schema is refused.
Patterns run on RE2. The work of a check is counted; a value that would take more does not conform, and is told why.
No schema and no value makes a function of this package raise anything.

`form` says what a schema may be, `validation` and `keywords` hold values against it, `references` finds what a `$ref`
names.
"""

from app.json_schema.form import Allowance, problems
from app.json_schema.validation import conforms, deviations, value_problems
from app.json_schema.values import Deviation

__all__ = ["Allowance", "Deviation", "conforms", "deviations", "problems", "value_problems"]
