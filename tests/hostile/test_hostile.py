"""Hostile checkpoints end in one sentence that names the file, with exit code 1 or 2, and change nothing on disk."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from lowbit import plugins
from lowbit.errors import LowbitError
from lowbit.stages.checkpoint import open_checkpoint, require_explained
from tests.hostile import layouts, onnx_models, packed
from tests.hostile.cases import CASES as FIRST
from tests.hostile.cases import Case

CASES = [*FIRST, *layouts.CASES, *packed.CASES, *onnx_models.CASES]


def _snapshot(root: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and path.stat().st_size < 1e6
        else "-"
        for path in sorted(root.rglob("*"))
    }


def _read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    require_explained(checkpoint)
    for name in checkpoint.weights:
        checkpoint.load(name)


def test_there_are_enough_and_no_two_are_alike() -> None:
    assert len(CASES) == len({case.id for case in CASES}) >= 40


def test_there_are_ten_for_every_format_that_is_read() -> None:
    counts = Counter(case.format for case in CASES)
    assert {name: counts[name] for name in plugins.names("formats") if counts[name] < 10} == {}


@pytest.mark.parametrize("name", packed.SOUND)
def test_the_same_without_damage_is_read(name: str, tmp_path: Path) -> None:
    """Otherwise a case might be refused for what all of its kind have."""
    path = packed.SOUND[name](tmp_path)
    _read_all(path)
    assert open_checkpoint(path).format == name.partition(" ")[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_refused_in_one_sentence(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.format and case.format not in plugins.names("formats"):
        pytest.skip(f"there is no format {case.format}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = case.build(tmp_path)
    before = _snapshot(tmp_path)
    with pytest.raises(LowbitError) as caught:
        _read_all(path)
    text = str(caught.value)
    assert [part for part in (*case.says, str(tmp_path)) if part not in text] == [], text
    assert text.isprintable() and len(text) < 900
    assert caught.value.exit_code in (1, 2)
    assert _snapshot(tmp_path) == before
