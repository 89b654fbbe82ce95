"""What counts of a text that a language model wrote."""

from __future__ import annotations

import re
from decimal import Decimal

from benchmark.testbeds.declared.asking import LAST_NUMBER, TEXT

# A minus behind a digit, a letter or a bracket is a subtraction or a hyphen.
_NUMBER = re.compile(r"((?<![\w)])-)?[$€£]?(\d[\d,]*(?:\.\d+)?|\.\d+)")


def extracted(text: str, how: str) -> str | None:
    """What ``how`` finds in ``text``; None if nothing.

    ``text``: all of it, without white space around it. ``last-number``: the last number, so written
    that equal numbers are equal (1,234 and 1234.0). Else a regular expression: its group where it
    matches first.
    """
    if how == TEXT:
        return text.strip()
    if how == LAST_NUMBER:
        return _last_number(text)
    found = re.search(how, text)
    return None if found is None or found[1] is None else found[1].strip()


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text.replace("−", "-"))
    if not found:
        return None
    sign, digits = found[-1]
    value = Decimal(digits.replace(",", ""))
    return format((-value if sign and value else value).normalize(), "f")
