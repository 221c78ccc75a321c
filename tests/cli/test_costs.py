"""`arriero costs` and `arriero budgets`."""

from __future__ import annotations

import json

import pytest

from app.kernel.errors import NotFound
from tests.cli.conftest import Arriero
from tests.governance.costs.conftest import Spend, spend  # noqa: F401 a fixture


def test_costs_are_printed_and_compared(arriero: Arriero, spend: Spend) -> None:  # noqa: F811 as above
    assert "no model did anything" in arriero("costs", "--since", "1h").stdout
    spend("0.25", workflow="digest")
    spend(None, workflow="other", tokens=(0, 0, 0))
    found = arriero("costs", "--by", "workflow", "--since", "30d").output
    assert "0.250000" in found
    assert "1 attempts have no known cost" in found
    assert json.loads(arriero("costs", "--by", "label:team", "--json").stdout)["lines"][0]["key"] == ""
    compared = arriero("costs", "estimate", "--on", "smollm2:135m", "--since", "7d").stdout
    assert "it cost: 0.250000 USD (1 attempts of unknown cost)" in compared
    assert "on smollm2:135m: unknown" in compared


def test_budgets_are_set_listed_and_removed(arriero: Arriero, spend: Spend) -> None:  # noqa: F811 as above
    assert "there is no budget" in arriero("budgets", "list").stdout
    arriero("budgets", "set", "monthly", "2", "--namespace", "a", "--hard", "--spare-interactive")
    spend("1.5")
    listed = arriero("budgets", "list").stdout
    assert "75%" in listed
    shown = json.loads(arriero("budgets", "show", "monthly", "--namespace", "a", "--json").stdout)
    assert (shown["spent"], shown["hard"], shown["spares_interactive"]) == (1.5, True, True)
    arriero("budgets", "remove", "monthly", "--namespace", "a")
    with pytest.raises(NotFound):
        arriero("budgets", "remove", "monthly", "--namespace", "a")
