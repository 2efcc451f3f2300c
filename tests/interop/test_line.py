"""The embedded model through the whole line, opened by the owner of the format: the same weights to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit import api
from lowbit.stages.checkpoint import open_checkpoint


def with_awq(path: Path) -> dict[str, Tensor]:
    """auto-round's dequantization, in float16."""
    utils = pytest.importorskip("auto_round.export.export_to_awq.utils")
    tensors = load_file(path / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = {each: [tensors[f"{each}.{part}"] for part in ("qweight", "qzeros", "scales")] for each in modules}
    return {f"{each}.weight": utils.dequantize_gemm(*parts[each], 4, 128).T for each in modules}


def with_transformers(path: Path) -> dict[str, Tensor]:
    """The state of the model; FP8 is dequantized where there is no GPU."""
    transformers = pytest.importorskip("transformers")
    with torch.compiler.set_stance("force_eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    state: dict[str, Tensor] = model.state_dict()
    return state


def with_bitnet(path: Path) -> dict[str, Tensor]:
    """`autobitlinear` multiplies what its ternary weights give by the scale."""
    state = with_transformers(path)
    scaled = {name.removesuffix("_scale"): scale for name, scale in state.items() if name.endswith("weight_scale")}
    return {name: state[name] * scale for name, scale in scaled.items()}


def with_mlx(path: Path) -> dict[str, Tensor]:
    """In float32, where MLX rounds a product and a sum as we do; in 16 bits it rounds twice."""
    core = pytest.importorskip("mlx.core")
    tensors, declared = core.load(str(path / "model.safetensors")), json.loads((path / "config.json").read_text())
    modules = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    found = {}
    for each in modules:
        own = declared["quantization"].get(each, declared["quantization"])
        scales, biases = (tensors[f"{each}.{part}"].astype(core.float32) for part in ("scales", "biases"))
        weight = core.dequantize(tensors[f"{each}.weight"], scales, biases, own["group_size"], own["bits"])
        found[f"{each}.weight"] = torch.from_numpy(numpy.array(weight))
    return found


READERS: dict[str, tuple[str, Callable[[Path], dict[str, Tensor]]]] = {
    "awq": ("int4-g128-asym", with_awq),
    "fp8": ("fp8-e4m3-128x128", with_transformers),
    "mlx": ("int4-g64-min", with_mlx),
    "bitnet": ("levels[-1,0,1]-tensor", with_bitnet),
}


@pytest.mark.parametrize("name", READERS)
def test_the_owner_opens_what_the_line_wrote(name: str, tmp_path: Path, wiki_8m: Path) -> None:
    scheme, read = READERS[name]
    api.quantize(wiki_8m, tmp_path / "out", format=name, scheme=scheme)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        quantized = [each for each, weight in checkpoint.weights.items() if weight.scheme]
        found = read(tmp_path / "out")
        assert quantized and set(quantized) <= found.keys()
        for each in quantized:
            meant = checkpoint.dequantized(each, found[each].dtype)
            assert torch.equal(found[each], meant), each
