"""Recipes: what the name of a method and options of its steps are refused for."""

from __future__ import annotations

from typing import Any

import pytest

from lowbit.errors import LowbitError
from lowbit.stages._recipe import dotted, parse_recipe


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("dampp", 1, "gptq has no option 'dampp'; its options are: damp, block, order, "),
        ("damp", "abc", "gptq.damp is 'abc'; it must be a number"),
        ("damp", float("nan"), "gptq.damp is nan; it must be a number"),
        ("damp", None, "gptq.damp is None; it must be a number"),
        ("damp", True, "gptq.damp is True; it must be a number"),
        ("passes", 2.5, "gptq.passes is 2.5; it must be a whole number"),
        ("signed", "off", "gptq.signed is 'off'; it must be true or false"),
        ("signed", 0, "gptq.signed is 0; it must be true or false"),
        ("order", "grouped", "gptq.order is 'grouped'; it must be one of static, none, group, aware"),
        ("passes", -1, "options of gptq: .*passes 0 or more"),
        ("rank", 4, "gptq has no option 'rank', but lqer has: write it lqer.rank"),
        ("lqer.rank", 1.5, "lqer.rank is 1.5; it must be a whole number or null"),
    ],
)
def test_options_that_a_step_does_not_take_are_refused(key: str, value: Any, reason: str) -> None:
    with pytest.raises(LowbitError, match=reason):
        dotted({key: value}, parse_recipe("rotate+gptq+lqer"))


def test_options_that_a_step_takes_are_kept() -> None:
    given = {"damp": 1, "signed": False, "order": "none", "rotate.seed": 3, "lqer.rank": None}
    kept = dotted(given, parse_recipe("rotate+gptq+lqer"))
    assert kept == {"gptq.damp": 1, "gptq.signed": False, "gptq.order": "none", "rotate.seed": 3, "lqer.rank": None}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("awwq", "no step is called 'awwq'; there are: rotate, awq, .*gptq, .*lqer, .*tune"),
        ("gptq+", "no step is called ''"),
        ("awq+awq+gptq", "names awq twice"),
    ],
)
def test_names_that_no_step_has_or_twice_are_refused(name: str, reason: str) -> None:
    with pytest.raises(LowbitError, match=reason):
        parse_recipe(name)
