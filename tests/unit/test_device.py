"""Calibrated runs with blocks on another device: a simulated one, which refuses what a GPU would refuse."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from lowbit.cli import group
from lowbit.errors import ResourceError, UsageError
from lowbit.stages import calibrate as stage
from lowbit.stages._model import open_blueprint
from lowbit.stages.checkpoint import open_checkpoint
from tests.reference import simulated
from tests.reference.models import save_tiny

# In a thread that has not used a GPU yet, torch says once that it sets it up.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"
)

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch sees")
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "gptq", {}),
    ("llama", "awq+gptaq", {}),
    ("llama", "autoround", {"options": {"iterations": 3}}),
    ("llama", "let+omniquant", {"options": {"epochs": 1, "let.steps": 2}}),
    ("llama", "smoothquant+rtn+eora", {"scheme": "int8-row", "activations": "int8-row", "options": {"eora.rank": 2}}),
    ("mixtral", "gptq", {}),
]


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process that has the device."""
    folder = tmp_path_factory.mktemp("device")
    with ProcessPoolExecutor(1, get_context("spawn"), simulated.start, (folder,)) as pool:
        yield pool


def test_the_device_refuses_what_is_not_on_it(elsewhere: ProcessPoolExecutor) -> None:
    assert "same device" in elsewhere.submit(simulated.refusal).result()


@pytest.mark.parametrize("place", [simulated.NAME, pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(("kind", "method", "more"), CASES)
def test_blocks_on_a_device_give_what_they_give_on_the_processor(
    kind: str, method: str, more: dict[str, Any], place: str, elsewhere: ProcessPoolExecutor, tmp_path: Path
) -> None:
    save_tiny(kind, tmp_path / "model")
    work = partial(simulated.quantized, tmp_path / "model", tmp_path / "there", method, place, **more)
    # where the simulated device is known, torch's autograd takes no other
    there, devices = elsewhere.submit(work).result() if place == simulated.NAME else work()
    assert devices == {place}
    here, devices = simulated.quantized(tmp_path / "model", tmp_path / "here", method, "cpu", **more)
    assert devices == {"cpu"} and here.keys() == there.keys() and here
    for name, weight in here.items() if method in ("gptq", "autoround") else ():
        alike = torch.isclose(there[name], weight, rtol=1e-3, atol=1e-4)
        assert alike.float().mean() > 0.99, "sums in another order decide a tie here and there, no more"
    # Where candidates are nearly equal on random weights, another may be chosen.
    original = logits(tmp_path / "model")
    gaps = [(logits(tmp_path / folder) - original).norm().item() for folder in ("here", "there")]
    assert 0 < gaps[1] < 1.1 * gaps[0]


@torch.inference_mode()
def logits(model: Path) -> Tensor:
    found: Tensor = open_blueprint(open_checkpoint(model), torch.float32).resident()(input_ids=simulated.IDS).logits
    return found


@pytest.mark.parametrize("name", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=f"--device {name}: torch .* cannot use it"):
        simulated.quantized(tmp_path / "model", tmp_path / "out", "gptq", name)
    assert not (tmp_path / "out").exists()


def test_a_device_without_calibration_is_refused(tmp_path: Path) -> None:
    found = CliRunner().invoke(group, ["quantize", str(tmp_path), str(tmp_path / "out"), "--device", "cuda"])
    assert found.exit_code == 2 and "--device cuda is for --calibration" in found.output


def test_a_device_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(stage, "_run_block", full)
    save_tiny("llama", tmp_path / "model")
    with pytest.raises(ResourceError, match=r"do not fit the device \(CUDA out of memory. Tried to allocate 2.00 GiB"):
        simulated.quantized(tmp_path / "model", tmp_path / "out", "gptq", "cpu")
