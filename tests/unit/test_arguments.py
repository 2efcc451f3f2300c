"""Arguments from Python: one string in place of several, and a sentence for what makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.errors import UsageError
from tests.reference.models import save_tiny

LOWBIT: Any = lowbit  # of which mypy knows no types


def test_one_pattern_is_a_list_of_one(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    lowbit.quantize(tmp_path / "m", tmp_path / "q", scheme="int4-g16", skip="down_proj", sets="up_proj=int8-g16")
    weights = lowbit.open_checkpoint(tmp_path / "q").weights.values()
    schemes = {
        w.name.split(".")[-2]: str(w.scheme)[:4] for w in weights if "layers.1" in w.name and "norm" not in w.name
    }
    assert [schemes.pop(name) for name in ("down_proj", "up_proj")] == ["None", "int8"] and {*schemes.values()} == {
        "int4"
    }
    listed: dict[str, Any] = {"skip": ["down_proj"], "sets": {"up_proj": "int8-g16"}}
    bare: dict[str, Any] = {"skip": "down_proj", "sets": ["up_proj=int8-g16"]}
    plans = [lowbit.make_plan(tmp_path / "m", scheme="int4-g16", **each) for each in (listed, bare)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, out: LOWBIT.quantize(m, out, sets=["up_proj"]), "sets has 'up_proj'; write REGEX=SCHEME"),
        (
            lambda m, out: LOWBIT.quantize(m, out, sets={"a": 4}),
            "sets is .*; it must be str or Sequence.str. or Mapping.str, str. or None$",
        ),
        (lambda m, out: LOWBIT.quantize(m, out, scheme=4), "^scheme is 4; it must be str or None"),
        (lambda m, out: LOWBIT.quantize(m, out, skip=4), "^skip is 4; it must be str or Sequence.str."),
        (lambda m, out: LOWBIT.quantize(m, out, skip=[4]), "^skip is .4.; it must be"),
        (lambda m, out: LOWBIT.quantize(m, None), "^out is None; it must be str or Path"),
        (lambda m, out: LOWBIT.quantize(m, out, threads=0), "^threads is 0; it must be at least 1"),
        (lambda m, out: LOWBIT.quantize(m, out, seed="a"), "^seed is 'a'; it must be int"),
        (lambda m, out: LOWBIT.convert(m, out, format="float", threads=-3), "^threads is -3"),
        (lambda m, out: LOWBIT.make_plan(m, scheme=4), "^scheme is 4"),
        (lambda m, out: LOWBIT.make_plan(m, threads=4, sets="="), "^sets has '='"),
        (lambda m, out: LOWBIT.evaluate(m, out, threads=0), "^threads is 0"),
        (lambda m, out: LOWBIT.load(m, threads=-1), "^threads is -1"),
        (lambda m, out: LOWBIT.load(m, threads="2"), "^threads is '2'; it must be int or None"),
        (lambda m, out: LOWBIT.load(m, exact="yes"), "^exact is 'yes'; it must be bool"),
        (lambda m, out: LOWBIT.open_checkpoint(None), "^source is None; it must be str or Path"),
        (lambda m, out: LOWBIT.parse(None), "^name is None; it must be str$"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(call: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        call(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
