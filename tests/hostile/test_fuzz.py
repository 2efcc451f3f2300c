"""A short run of the fuzzer's property: any bytes are read rightly or refused in one sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_header import VALUES, check, entry, mutate, seeds

SECONDS = 30.0  # the first input loads torch and the formats, under the checks of shapes
DTYPES = st.sampled_from(["U8", "F16", "F32", "I64", "F8_E5M2", "F4", "f32"])
NUMBERS = st.one_of(st.integers(-1, 40), st.sampled_from(VALUES))
ENTRIES = st.fixed_dictionaries(
    {"dtype": DTYPES, "shape": st.lists(NUMBERS, max_size=3), "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3)}
)
HEADERS = st.dictionaries(st.text(max_size=3), st.one_of(ENTRIES, NUMBERS), max_size=3)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _input(header: Any, size: int) -> bytes:
    return b"\x01" + bytes([size]) + json.dumps(header).encode()


@FEW
@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_bytes(tmp_path: Path, data: bytes, kind: int) -> None:
    check(bytes([kind]) + data, tmp_path / "input", SECONDS)


@FEW
@given(HEADERS, st.integers(0, 60))
def test_any_header(tmp_path: Path, header: Any, size: int) -> None:
    check(_input(header, size), tmp_path / "input", SECONDS)


@FEW
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6), st.randoms())
def test_every_good_header_is_read(tmp_path: Path, shapes: list[tuple[int, int]], rng: random.Random) -> None:
    header, at = {}, 0
    for number, (rows, cols) in enumerate(shapes):
        header[str(number)] = entry("F16", [rows, cols], at, at + 2 * rows * cols)
        at += 2 * rows * cols
    names = rng.sample(sorted(header), len(header))
    assert check(_input({name: header[name] for name in names}, at), tmp_path / "input", SECONDS) == "read"


def test_the_seeds_are_read(tmp_path: Path) -> None:
    results = [check(seed, tmp_path / "input", SECONDS) for seed in seeds()]
    assert results == ["read"] * (len(results) - 1) + ["refused"]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_seeds(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        data = rng.choice(seeds())
        for _ in range(rng.randint(1, 4)):
            data = mutate(data, rng)
        check(data, tmp_path / "input", SECONDS)
