"""Which conversions are lossless: every format that is read, in several schemes, into every format that is written.

    python benchmarks/matrix.py [--dtype float16] [--json]

Formats are found by listing. For each format and each scheme that it holds, a small checkpoint is made (bell-shaped
weights, rounded to nearest; `act-order`: columns in groups of an order of their own) and converted to every other.
Lossless conversions are read again, compared to the bit, and converted back; a star says that this gave other bytes of
the same values, because the other format spells the scheme otherwise. A number is the relative squared error with
`--lossy`. `-`: refused, the reasons follow. Prints the table of docs/formats/conversion.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import lowbit
from lowbit import plugins
from lowbit.errors import FormatError, LowbitError, UnsupportedError
from lowbit.formats import Format, Weight
from lowbit.schemes import parse
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.convert import Converted
from lowbit.stages.plan import Entry
from lowbit.stages.quantize import quantize_weight
from lowbit.tensors import view_shape

SCHEMES = (
    "int2-g64", "int3-g128", "int4-g32", "int4-g128", "int4-row", "int8-g128", "int8-row", "int4-g64-asym",
    "int8-g64-asym", "int4-g64-fzero", "nf4-g64", "nf4-g64-dq", "fp4-g64", "fp8-e4m3-tensor", "fp8-e4m3-row",
    "fp8-e4m3-128x128", "mxfp4", "mxfp8", "nvfp4",
)  # fmt: skip
NAMES = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down")]
SHAPE = (128, 256)


@dataclass(frozen=True)
class Result:
    """One conversion: `lossless`, `lossless*`, the error, or `-`; and the reason where it is not lossless."""

    source: str
    scheme: str
    target: str
    outcome: str
    reason: str = ""
    to: str = ""


def packed(form: Format, name: str, seed: int, scheme: str, act_order: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight of random values, rounded to nearest, as the format stores it."""
    weight = Weight(name, SHAPE, dtype)
    weight = replace(weight, scheme=form.fit(parse(scheme), weight))
    assert weight.scheme is not None
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) / 20
    codes = torch.empty(view_shape(SHAPE, weight.scheme.block), dtype=torch.uint8)
    _, q, _ = quantize_weight({}, Entry(weight, "rtn", ""), values, codes, 1 << 20)
    if act_order and q.scales.shape[1] > 1:
        order = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(seed))
        q = replace(q, group_index=(order % q.scales.shape[1]).int())
    into = {part: torch.empty(spec.shape, dtype=spec.dtype) for part, spec in form.layout(weight).items()}
    form.pack(weight, q, into)
    if act_order and form.unpack(weight, into, None).group_index is None:
        raise UnsupportedError("there is no place for the order, or one group only")
    return into


def make(path: Path, form: Format, scheme: str, act_order: bool, dtype: torch.dtype) -> bool:
    """A checkpoint of two quantized weights and two others; False where the format does not hold it."""
    tensors = {"model.embed_tokens.weight": torch.zeros(64, SHAPE[1], dtype=dtype)}
    tensors |= {"model.norm.weight": torch.ones(SHAPE[1], dtype=dtype)}
    weights = [Weight(name, tuple(tensor.shape), dtype) for name, tensor in tensors.items()]
    try:
        for seed, name in enumerate(NAMES):
            tensors |= packed(form, name, seed, scheme, act_order, dtype)
            weight = Weight(name, SHAPE, dtype)
            weights.append(replace(weight, scheme=form.fit(parse(scheme), weight)))
    except (UnsupportedError, FormatError):
        return False
    path.mkdir()
    config = {"model_type": "llama", "torch_dtype": str(dtype).removeprefix("torch.")}
    if act_order:
        config |= {"quantization_config": {"desc_act": True}}  # type: ignore[dict-item]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for file, document in form.config(weights, config).items():
        (path / file).write_text(json.dumps(document))
    return True


def values(path: Path) -> dict[str, Tensor]:
    """Every weight in float32."""
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.dequantized(name, torch.float32) for name in checkpoint.weights}


def equal(one: Path, other: Path) -> bool:
    """Whether two checkpoints stand for the same weights, to the bit."""
    left, right = values(one), values(other)
    return left.keys() == right.keys() and all(torch.equal(bits(left[name]), bits(right[name])) for name in left)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().view(torch.uint8)


def attempt(root: Path, source: str, scheme: str, target: str) -> Result:
    """Convert `root/in` to a format, and back where that was lossless."""
    start, there, back = root / "in", root / target, root / f"{target}-back"
    try:
        done = lowbit.convert(start, there, format=target)
    except UnsupportedError as refused:
        try:
            done = lowbit.convert(start, there, format=target, lossy=True)
        except LowbitError as error:
            return Result(source, scheme, target, "-", str(error))
        return Result(source, scheme, target, f"{done.error:.2g}", str(refused), named(done))
    if not equal(start, there):
        raise SystemExit(f"{source} {scheme} to {target} was called lossless, and is not")
    lowbit.convert(there, back, format=source)
    if not equal(start, back):
        raise SystemExit(f"{source} {scheme} to {target} and back gave other weights")
    same = (back / "model.safetensors").read_bytes() == (start / "model.safetensors").read_bytes()
    return Result(source, scheme, target, "lossless" if same or target == "float" else "lossless*", "", named(done))


def named(done: Converted) -> str:
    """The scheme that was written."""
    return next((group.after for group in done.groups if group.after), None) or "kept"


def held(form: Format, dtype: torch.dtype) -> list[str]:
    """The schemes that a format holds, those that are one in it once."""
    found: dict[str, str] = {}
    for scheme in SCHEMES:
        with suppress(UnsupportedError):
            found.setdefault(str(form.fit(parse(scheme), Weight(NAMES[0], SHAPE, dtype))), scheme)
    return list(found.values())


def results(dtype: torch.dtype) -> list[Result]:
    """All conversions."""
    found: list[Result] = []
    formats = [name.replace("_", "-") for name in plugins.names("formats")]
    for source in formats:
        form: Format = plugins.load("formats", source)
        for scheme in held(form, dtype):
            for act_order in (False, True):
                with tempfile.TemporaryDirectory(prefix="lowbit-matrix-") as folder:
                    root = Path(folder)
                    if not make(root / "made", form, scheme, act_order, dtype):
                        continue
                    try:
                        lowbit.convert(root / "made", root / "in", format=source)  # the same, as we write it
                    except LowbitError as error:
                        print(f"{source} {scheme}: {error}", file=sys.stderr)
                        continue
                    print(source, scheme, "act-order" if act_order else "", file=sys.stderr, flush=True)
                    name = f"{scheme}, act-order" if act_order else scheme
                    found += [attempt(root, source, name, target) for target in [*formats, "float"] if target != source]
    return found


def table(found: list[Result]) -> str:
    """Markdown: a row for each source, a column for each target, and the reasons."""
    targets = list(dict.fromkeys(each.target for each in found))
    targets.sort(key=lambda name: (name == "float", name))
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for each in found:
        rows.setdefault((each.source, each.scheme), {})[each.target] = each
    lines = [f"| from | scheme | {' | '.join(targets)} |", "|---|---" + "|---" * len(targets) + "|"]
    for (source, scheme), row in rows.items():
        cells = [cell(row[target]) if target in row else "" for target in targets]
        lines.append(f"| {source} | `{scheme}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(each: Result) -> str:
    """The outcome, and for a number the scheme that it is of."""
    return f"{each.outcome} `{each.to}`" if each.outcome[0].isdigit() and each.to != "kept" else each.outcome


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = results(getattr(torch, args.dtype))
    print(json.dumps([asdict(each) for each in found], indent=1) if args.json else table(found))


if __name__ == "__main__":
    main()
