"""`lowbit inspect` of every format that is read, found by listing, in the schemes of the table of conversions."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.matrix import original, sources
from lowbit import plugins
from tests.e2e.command import CommandLine

FEW = {"onnx": 3}  # each is a whole run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama of which the table is made."""
    return original(tmp_path_factory.mktemp("inspect") / "model", torch.float16)


@pytest.mark.parametrize("name", plugins.names("formats"))
def test_every_format_is_told_as_text_and_as_json(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lowbit, told = CommandLine(monkeypatch, capsys), 0
    for _, scheme, path in islice(sources(model, tmp_path, name), FEW.get(name)):
        if not path.exists():  # the format does not hold it
            continue
        code, text, wrong = lowbit("inspect", path)
        assert f"format      {name}\n" in text, (scheme, wrong)
        assert name != "gguf" or scheme in text  # the type's own name, also where the scheme has another
        found = lowbit.report(path, code)
        assert (found["format"], found["sound"]) == (name, code == 0), (scheme, text)
        assert found["sound"] or name == "spqr", (scheme, text)  # some of its scales are 0 at random
        assert [each["kind"] for each in found["tensors"]].count("quantized") in (1, 2), scheme
        if found["sound"] and name != "mxfp4":  # which is of another model
            code, text, wrong = lowbit("inspect", path, "--original", model)
            assert "verdict     " in text, (scheme, wrong)
        told += 1
    if not told and name == "quanto":
        pytest.skip("optimum-quanto is not installed")
    assert told
