"""The same hostile checkpoints given to commands that write: one sentence, exit code 1 or 2, no output directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import CommandLine
from tests.hostile.cases import Case
from tests.hostile.test_hostile import CASES

COMMANDS = {
    "quantize": ["--scheme", "int8-row"],
    "convert": ["--format", "compressed-tensors", "--lossy", "--threads", "1"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_the_command_refuses_it(
    case: Case, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, _, text = CommandLine(monkeypatch, capsys)(name, case.build(tmp_path), out, *COMMANDS[name])
    assert code in (1, 2)
    lines = [line for line in text.splitlines() if not line.startswith("check: ")]  # how far it came
    assert len(lines) == 1 and lines[0].startswith("lowbit: "), text
    assert not out.exists()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_inspect_does_not_call_it_sound(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong with one weight stands beside what was found of the others."""
    code, told, text = CommandLine(monkeypatch, capsys)("inspect", case.build(tmp_path))
    assert code in (1, 2)
    assert "\nnot sound: " in told or text.splitlines()[-1].startswith("lowbit: ")
