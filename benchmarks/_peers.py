"""One quantization by another package, in a process of its own and with the interpreter that has the package.

    PYTHON benchmarks/_peers.py '{"tool": "hqq", "model": DIR, "windows": FILE.npy, "out": DIR, "bits": 4, ...}'

`benchmarks/quality.py` starts it. The package's own defaults hold for whatever is not given: bits, group, symmetry,
iterations, the windows of tokens. Prints one JSON line with seconds for loading, quantizing and saving, and writes what
the quantized model computes with as a plain float32 checkpoint, so that one evaluator scores every package.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Job = dict[str, Any]
Weights = dict[str, Tensor]
Clock = dict[str, float]


@contextmanager
def timed(clock: Clock, name: str) -> Iterator[None]:
    """Wall seconds of a part."""
    start = time.perf_counter()
    yield
    clock[name] = time.perf_counter() - start


def load(job: Job) -> tuple[Any, Any]:
    """Model in the type in which it is to compute, and its tokenizer."""
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    return model.eval(), transformers.AutoTokenizer.from_pretrained(job["model"])


def windows(job: Job) -> Tensor:
    """Tokens to calibrate on."""
    return torch.from_numpy(np.load(job["windows"]))


def linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that every tool quantizes: those of the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            yield name, module


def floats(model: nn.Module) -> Weights:
    """Float32 copies of what a model holds, apart from what packages add."""
    return {name: tensor.detach().float() for name, tensor in model.state_dict().items() if name.endswith("weight")}


def llmcompressor(job: Job, clock: Clock) -> Weights:
    """GPTQ or AWQ of llm-compressor (AWQ searches scales; its own quantization step follows)."""
    lib: Any = import_module("llmcompressor")
    gptq: Any = import_module("llmcompressor.modifiers.gptq")
    datasets: Any = import_module("datasets")
    with timed(clock, "load"):
        model, tokenizer = load(job)
        model.to(job["device"])
    args = {"num_bits": job["bits"], "type": "int", "symmetric": job["sym"], "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": args | {"group_size": job["group"]}}}
    common = {"config_groups": groups, "ignore": ["lm_head"]}
    recipe = [gptq.GPTQModifier(**common)] if job["method"] == "gptq" else _llmcompressor_awq(common)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows(job).tolist()]
    with timed(clock, "quantize"):
        lib.oneshot(
            model=model, tokenizer=tokenizer, dataset=datasets.Dataset.from_list(rows), recipe=recipe,
            max_seq_length=len(rows[0]["input_ids"]), num_calibration_samples=len(rows), batch_size=job["batch"],
            shuffle_calibration_samples=False, pipeline="sequential",
        )  # fmt: skip
    return floats(model) | {f"{name}.weight": _as_quantized(module) for name, module in linears(model)}


def _llmcompressor_awq(common: dict[str, Any]) -> list[Any]:
    """Its AWQ pins memory, which fails without an accelerator and changes no number: that is switched off."""
    cache: Any = import_module("llmcompressor.pipelines.cache").IntermediatesCache
    cache.pin_memory = lambda *_: None
    awq: Any = import_module("llmcompressor.modifiers.transform.awq")
    quantization: Any = import_module("llmcompressor.modifiers.quantization")
    return [awq.AWQModifier(), quantization.QuantizationModifier(**common)]


def _as_quantized(module: Any) -> Tensor:
    """Weights on their grid, by the package's own function; weights that are there already stay."""
    forward: Any = import_module("compressed_tensors.quantization.lifecycle.forward")
    found: Tensor = forward.fake_quantize(
        module.weight.detach().float(),
        module.weight_scale.float(),
        getattr(module, "weight_zero_point", None),
        module.quantization_scheme.weights,
        getattr(module, "weight_g_idx", None),
    )
    return found


def gptqmodel(job: Job, clock: Clock) -> Weights:
    """GPTQ or AWQ of GPTQModel."""
    lib: Any = import_module("gptqmodel")
    config = lib.QuantizeConfig(bits=job["bits"], group_size=job["group"], sym=job["sym"], method=job["method"])
    with timed(clock, "load"):
        model = lib.GPTQModel.load(job["model"], config, device="cpu", dtype=getattr(torch, job["dtype"], "auto"))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows(job)]
    with timed(clock, "quantize"):
        model.quantize(rows, batch_size=job["batch"])
    own = job["out"] + ".own"
    with timed(clock, "save"):
        model.save(own)
    stored = load_file(f"{own}/model.safetensors")
    weights = {name: tensor.float() for name, tensor in stored.items() if name.endswith(".weight")}
    return weights | (_gptqmodel_awq(stored, job) if job["method"] == "awq" else _gptqmodel_gptq(lib, own))


def _gptqmodel_gptq(lib: Any, own: str) -> Weights:
    """What its layers compute with, in float32; they are loaded in the type in which scales are stored."""
    weights = {}
    for name, module in lib.GPTQModel.load(own, device="cpu", dtype=torch.float16).model.named_modules():
        if hasattr(module, "qweight"):
            module.scales.data = module.scales.data.float()
            weights[f"{name}.weight"] = module.dequantize_weight().T
    return weights


def _gptqmodel_awq(stored: Weights, job: Job) -> Weights:
    """The same by the function that its layers share."""
    packing: Any = import_module("gptqmodel.quantization.awq.utils.packing_utils")
    weights = {}
    for name in [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]:
        codes, zeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        weights[f"{name}.weight"] = packing.dequantize_gemm(codes, zeros, scales.float(), job["bits"], job["group"]).T
    return weights


def auto_round(job: Job, clock: Clock) -> Weights:
    """SignRound of auto-round, or its AWQ before its rounding."""
    lib: Any = import_module("auto_round")
    with timed(clock, "load"):
        model, tokenizer = load(job)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows(job)]
    more: Job = {"algorithm": "awq"} if job["method"] == "awq" else {"iters": job["iterations"]}
    more["amp"] = job["dtype"] != "float32"  # else it computes in bfloat16 on a processor, whatever the model's type
    with timed(clock, "quantize"):
        rounder = lib.AutoRound(
            model, tokenizer, bits=job["bits"], group_size=job["group"], sym=job["sym"], dataset=rows,
            nsamples=len(rows), seqlen=len(windows(job)[0]), seed=job["seed"], device_map=job["device"], **more,
        )  # fmt: skip
        quantized, _ = rounder.quantize()
    return floats(quantized)


def hqq(job: Job, clock: Clock) -> Weights:
    """HQQ, which takes no data. Its layers hold scales and zero points in the type of the model: so they are taken."""
    quantizer: Any = import_module("hqq.core.quantize").Quantizer
    with timed(clock, "load"):
        model, _ = load(job)
    found, weights = {}, floats(model)
    with timed(clock, "quantize"):
        for name, module in linears(model):
            found[name] = quantizer.quantize(
                module.weight.data, nbits=job["bits"], group_size=job["group"], axis=1, device="cpu"
            )
    for name, (codes, meta) in found.items():
        codes, meta = quantizer.to_inplace(codes, meta | {"compute_dtype": model.dtype}, "cpu")
        weights[f"{name}.weight"] = quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    return weights


PEERS: dict[str, tuple[Callable[[Job, Clock], Weights], str]] = {
    "llmcompressor": (llmcompressor, "llmcompressor"),
    "gptqmodel": (gptqmodel, "gptqmodel"),
    "auto-round": (auto_round, "auto-round"),
    "hqq": (hqq, "hqq"),
}


def write(weights: Weights, job: Job) -> None:
    """A checkpoint with the original's configuration and tokenizer."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    for file in Path(job["model"]).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "model.safetensors")


def main() -> None:
    """Run one job."""
    job, clock = json.loads(sys.argv[1]), Clock()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    run, package = PEERS[job["tool"]]
    weights = run(job, clock)
    if weights:
        write(weights, job)
    print(json.dumps({"seconds": clock, "version": metadata.version(package), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
