"""
Numbers: grammar terms for the decimal numbers between two bounds, digit by digit.

Every text of `integers` and `decimals` is within the bounds, and every number within the bounds and the limit of digits
has a text. A decimal stays within its bounds when it is parsed as a double: rounding is monotonic, and the outermost
texts are checked.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

from app.grammar.gbnf import EMPTY, Chars, Repeat, Term, Text, chain, choice, optional

#: Maximum digits before the point, unless a bound has more: all such integers are exact as doubles.
INTEGER_DIGITS = 15

#: Maximum digits after the point.
DECIMALS = 10

_DIGIT = Chars(((0x30, 0x39),))
_NONZERO = Chars(((0x31, 0x39),))
_LARGEST = 10**INTEGER_DIGITS - 1
_UNIT: int = 10**DECIMALS


def any_number() -> Term:
    """Returns a number without bounds: at most 15 digits, 10 decimals and an exponent of two digits."""
    whole = choice(Text("0"), chain(_NONZERO, Repeat(_DIGIT, 0, INTEGER_DIGITS - 1)))
    exponent = chain(Chars(((0x45, 0x45), (0x65, 0x65))), optional(Chars(((0x2B, 0x2B), (0x2D, 0x2D)))))
    return chain(
        optional(Text("-")), whole, optional(_any_fraction(DECIMALS)), optional(chain(exponent, Repeat(_DIGIT, 1, 2)))
    )


def integers(low: int, high: int) -> Term:
    """Returns the integers from `low` to `high`, both included, without leading zeros and without -0."""
    options: list[Term] = []
    if low < 0:
        options.append(chain(Text("-"), _naturals(max(1, -high), -low)))
    if high >= 0:
        options.append(_naturals(max(0, low), high))
    return choice(*options)


def multiples(low: int, high: int, step: int) -> Term | None:
    """Returns the multiples of `step` within the bounds; None unless it is a power of ten or there are at most 256."""
    first, last = -(-low // step), high // step
    if step == 10 ** (len(str(step)) - 1):
        zeros = Text("0" * (len(str(step)) - 1))
        options = [chain(integers(first, min(last, -1)), zeros)] if first < 0 else []
        options += [Text("0")] if first <= 0 <= last else []
        options += [chain(integers(max(first, 1), last), zeros)] if last > 0 else []
        return choice(*options)
    if last - first < 256:
        return choice(*(Text(str(factor * step)) for factor in range(first, last + 1)))
    return None


def integer_bounds(
    low: float | None, above: float | None, high: float | None, below: float | None
) -> tuple[int, int] | None:
    """
    Returns the first and last integer within minimum, exclusiveMinimum, maximum and exclusiveMaximum, or None.

    A side without a bound ends at 15 digits, or at the number of digits of the other bound if this is greater.
    """
    firsts = [math.ceil(Fraction(low))] if low is not None else []
    firsts += [math.floor(Fraction(above)) + 1] if above is not None else []
    lasts = [math.floor(Fraction(high))] if high is not None else []
    lasts += [math.ceil(Fraction(below)) - 1] if below is not None else []
    digits = max([INTEGER_DIGITS, *(len(str(abs(bound))) for bound in firsts + lasts)])
    if digits > 3 * INTEGER_DIGITS:
        firsts = [max(first, -(10 ** (3 * INTEGER_DIGITS))) for first in firsts]
        lasts = [min(last, 10 ** (3 * INTEGER_DIGITS)) for last in lasts]
        digits = INTEGER_DIGITS
    first, last = max(firsts, default=-(10**digits) + 1), min(lasts, default=10**digits - 1)
    return (first, last) if first <= last else None


def decimal_bounds(
    low: float | None, above: float | None, high: float | None, below: float | None
) -> tuple[int, int] | None:
    """Returns the first and last number within the bounds, in units of the last decimal, or None."""
    firsts, lasts = [-_LARGEST * _UNIT], [_LARGEST * _UNIT]
    if low is not None:
        firsts.append(math.ceil(_units(low)))
    if above is not None:
        firsts.append(_first_unit_above(above, 1))
    if high is not None:
        lasts.append(math.floor(_units(high)))
    if below is not None:
        lasts.append(-_first_unit_above(-below, 1))
    return (max(firsts), min(lasts)) if max(firsts) <= min(lasts) else None


def decimals(first: int, last: int) -> Term:
    """Returns the decimals from `first` to `last`, in units of the last decimal, without -0 and without an exponent."""
    options: list[Term] = []
    if first < 0:
        options.append(chain(Text("-"), _positive_decimals(max(1, -last), -first)))
    if last >= 0:
        options.append(_positive_decimals(max(0, first), last))
    return choice(*options)


def _units(bound: float) -> Fraction:
    return Fraction(Decimal(repr(bound))) * _UNIT


def _first_unit_above(bound: float, step: int) -> int:
    """Returns the first multiple of the unit whose double is above `bound`."""
    unit = math.floor(_units(bound)) + step
    if unit / _UNIT > bound:
        return unit
    return math.ceil(Fraction(math.nextafter(float(bound), math.inf)) * _UNIT)


def _naturals(low: int, high: int) -> Term:
    short, long = len(str(low)), len(str(high))
    if short == long:
        return _between(str(low), str(high))
    options: list[Term] = []
    if low in (0, 1) or low == 10 ** (short - 1):
        middle_from = short
        options += [Text("0")] if low == 0 else []
    else:
        middle_from = short + 1
        options.append(_between(str(low), "9" * short))
    whole = high == 10**long - 1
    middle_to = long if whole else long - 1
    if middle_from <= middle_to:
        options.append(chain(_NONZERO, _digits(middle_from - 1, middle_to - 1)))
    if not whole:
        options.append(_between("1" + "0" * (long - 1), str(high)))
    return choice(*options)


def _between(low: str, high: str) -> Term:
    """Returns the digit strings from `low` to `high`, which have the same length."""
    rest = len(low) - 1
    if set(low) <= {"0"} and set(high) <= {"9"}:
        return _digits(len(low), len(low))
    if low[0] == high[0]:
        return chain(Text(low[0]), _between(low[1:], high[1:]))
    options: list[Term] = []
    first, last = int(low[0]), int(high[0])
    if set(low[1:]) - {"0"}:
        options.append(chain(Text(low[0]), _between(low[1:], "9" * rest)))
        first += 1
    upper = bool(set(high[1:]) - {"9"})
    if first <= last - upper:
        options.append(chain(_one_of(first, last - upper), _digits(rest, rest)))
    if upper:
        options.append(chain(Text(high[0]), _between("0" * rest, high[1:])))
    return choice(*options)


def _positive_decimals(first: int, last: int) -> Term:
    (low, low_part), (high, high_part) = divmod(first, _UNIT), divmod(last, _UNIT)
    nothing, full = "0" * DECIMALS, "9" * DECIMALS
    low_digits, high_digits = f"{low_part:0{DECIMALS}}", f"{high_part:0{DECIMALS}}"
    if low == high:
        return chain(Text(str(low)), _fraction(low_digits, high_digits))
    options: list[Term] = []
    if low_digits != nothing:
        options.append(chain(Text(str(low)), _fraction(low_digits, full)))
        low += 1
    upper = high_digits != full
    if low <= high - upper:
        options.append(chain(_naturals(low, high - upper), optional(_any_fraction(DECIMALS))))
    if upper:
        options.append(chain(Text(str(high)), _fraction(nothing, high_digits)))
    return choice(*options)


def _fraction(low: str, high: str) -> Term:
    """Returns the point and the decimals from `low` to `high`; optional if zero is among them."""
    if set(high) <= {"0"}:
        return optional(chain(Text("."), Repeat(Text("0"), 1, len(high))))
    term = chain(Text("."), _decimals_between(low, high))
    return term if set(low) - {"0"} else optional(term)


def _decimals_between(low: str, high: str) -> Term:
    """Returns the digit strings, up to the length of the bounds, whose values as decimals are between them."""
    first, last = int(low[0]), int(high[0])
    if first == last:
        return chain(Text(low[0]), _more_decimals(low[1:], high[1:]))
    options: list[Term] = []
    rest = len(low) - 1
    if set(low[1:]) - {"0"}:
        options.append(chain(Text(low[0]), _more_decimals(low[1:], "9" * rest)))
        first += 1
    upper = bool(set(high[1:]) - {"9"})
    if first <= last - upper:
        options.append(chain(_one_of(first, last - upper), _digits(0, rest)))
    if upper:
        options.append(chain(Text(high[0]), _more_decimals("0" * rest, high[1:])))
    return choice(*options)


def _more_decimals(low: str, high: str) -> Term:
    if not low:
        return EMPTY
    if set(high) <= {"0"}:
        return Repeat(Text("0"), 0, len(high))
    if set(low) <= {"0"} and set(high) <= {"9"}:
        return _digits(0, len(low))
    term = _decimals_between(low, high)
    return term if set(low) - {"0"} else optional(term)


def _any_fraction(most: int) -> Term:
    return chain(Text("."), Repeat(_DIGIT, 1, most))


def _digits(least: int, most: int) -> Term:
    if most == 0:
        return EMPTY
    return _DIGIT if least == most == 1 else Repeat(_DIGIT, least, most)


def _one_of(first: int, last: int) -> Term:
    return Text(str(first)) if first == last else Chars(((0x30 + first, 0x30 + last),))
