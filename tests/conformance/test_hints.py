"""Where a format refuses a scheme, the formats that are named in its place take it: every scheme, every format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit import plugins
from lowbit.errors import FormatError, UnsupportedError
from lowbit.pipeline import run_conversion
from lowbit.stages._changes import Changer, Goal
from lowbit.stages._rooms import Rooms
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Rules, make_plan
from tests.conformance.test_convert import FORMATS, SCHEMES, SOURCES
from tests.reference.checkpoints import NAMES, SHAPE, write_checkpoint

MORE = [
    "int4-g128-smooth",
    "int3-g20",
    "int4-flat64",
    "fp8-e5m2-row",
    "iq4_nl",
    "q4_k",
    "int5-g32",
    "int4-128x128",
    "int4-tensor",
]
NONE = "no other format holds it"


def hinted(text: str) -> set[str]:
    """The formats that a sentence names; none where it says that there are none."""
    found = re.search(r"; --format ([\w, -]+) holds it$", text)
    if found is None:
        assert text.endswith(NONE) and "--format" not in text, text
        return set()
    return set(re.split(r", | or ", found[1]))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("floats")
    save_file({NAMES[0]: torch.ones(SHAPE, dtype=torch.float16)}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama"}')
    return open_checkpoint(path)


@pytest.mark.parametrize("inputs", [None, "fp8-e4m3-row", "int8-row"])
@pytest.mark.parametrize("scheme", [*SCHEMES, *MORE])
def test_a_plan_names_formats_that_take_the_scheme(scheme: str, inputs: str | None, floats: Checkpoint) -> None:
    accepted, refused = set(), {}
    for name in plugins.names("formats"):
        try:
            make_plan(floats, Rules(scheme, "rtn", format=name, activations=inputs))
            accepted.add(name.replace("_", "-"))
        except UnsupportedError as error:
            refused[name] = str(error)
    for name, text in refused.items():
        if name == "gguf":  # which chooses schemes by itself
            assert "--format" not in text
        elif "method rtn" not in text:
            assert hinted(text) <= accepted, (name, text)
            assert hinted(text) or not accepted - {"gguf"}, (name, text)  # which has another for rows of 128


def lossless(path: Path, target: str) -> bool:
    """Whether a format, asked alone, has all values."""
    with open_checkpoint(path) as source:
        changer = Changer(source, Goal(target), torch.float16, Rooms(path, False), 1 << 20)
        return not isinstance(changer.lossless(source.weights[NAMES[0]]), str)


@pytest.mark.parametrize(("scheme", "name"), {scheme: name for name, scheme, _ in SOURCES}.items())
def test_a_conversion_names_formats_that_are_lossless(name: str, scheme: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    try:
        write_checkpoint(made, name, {NAMES[0]: scheme})
    except (FormatError, UnsupportedError) as error:
        pytest.skip(f"{name} has no such tensors at random, or not alone: {error}")
    named = set()
    for target in (each for each in FORMATS if each != name and not lossless(made, each)):
        with pytest.raises(UnsupportedError) as refused:
            run_conversion(str(made), tmp_path / target, Goal(target))
        named |= hinted(str(refused.value))
    for other in named:
        if other in FORMATS:
            assert run_conversion(str(made), tmp_path / other, Goal(other)).lossless
        assert other != name and lossless(made, other)  # gguf and onnx are of a whole model
