"""The same hostile checkpoints given to `lowbit quantize`: one sentence, exit code 1 or 2, and no output directory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowbit import cli
from tests.hostile.cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_the_command_refuses_it(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["lowbit", "quantize", str(case.build(tmp_path)), str(out), "--scheme", "int8-row"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    text = capsys.readouterr().err
    assert stopped.value.code in (1, 2)
    assert text.startswith("lowbit: ") and text.count("\n") == 1, text
    assert not out.exists()
