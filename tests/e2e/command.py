"""The command line without a process of its own, which takes seconds to import what the tests have imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, final

import pytest

from lowbit.cli import main


@final
class CommandLine:
    """`lowbit` in this process: exit code, standard output and standard error of one call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        self._capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *self._capsys.readouterr()

    def report(self, path: Path, code: int = 0) -> dict[str, Any]:
        """The JSON document of `lowbit inspect`."""
        ended, out, err = self("inspect", path, "--json")
        assert ended == code, err
        document: dict[str, Any] = json.loads(out)
        return document
