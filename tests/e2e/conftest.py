"""What every test of the command line may use."""

from __future__ import annotations

import pytest

from tests.e2e.command import CommandLine


@pytest.fixture
def lowbit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)
