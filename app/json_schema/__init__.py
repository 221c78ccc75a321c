"""
JSON Schema validation (draft 2020-12) for schemas from users: checks schemas, and validates values against them.

Nothing is fetched or opened: a reference points into the schema itself, or the schema is rejected.
Patterns run on RE2. The work of a validation is limited; a value that exceeds the limit does not conform, with that as
the reason.
No schema and no value makes a function of this package raise an exception.

`form` checks schemas, `validation` and `keywords` validate values, `references` resolves `$ref`.
"""

from app.json_schema.form import Allowance, problems
from app.json_schema.validation import conforms, deviations, value_problems
from app.json_schema.values import Deviation

__all__ = ["Allowance", "Deviation", "conforms", "deviations", "problems", "value_problems"]
