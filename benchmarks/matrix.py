"""Which conversions are lossless: every format that is read, in several schemes, into every format that is written.

    python -m benchmarks.matrix [--dtype float16] [--only FORMAT] [--json]

Formats are found by listing. For each format and each kind of scheme that it holds, a whole small Llama is made, two
of its matrices in that scheme (bell-shaped weights, rounded to nearest, in GGUF by its encoders; `act-order`: columns
in groups of an order of their own; codebooks and outliers at random), and converted to every format that is written;
those of formats that are never written are made by their owners' packages (torchao, optimum-quanto, auto-round, where
installed). `=`: lossless, and read again and compared to the bit; `=w`: weights are, and the inputs are no longer
rounded; a number is the relative squared error with `--lossy`; `-`: refused, the reasons follow. Prints the table of
docs/formats/conversion.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import lowbit
from lowbit import plugins
from lowbit.errors import FormatError, LowbitError, UnsupportedError
from lowbit.formats import Format, Weight
from lowbit.schemes import parse
from lowbit.stages._experts import apart
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Entry
from lowbit.stages.quantize import quantize_weight
from lowbit.tensors import QTensor, view_shape
from tests.reference.qtensors import random_qtensor

SCHEMES = (
    "int2-g64", "int4-g32", "int4-g128", "int8-row", "int4-g64-asym", "int4-g64-fzero", "int4-g64-min",
    "int4-g64-smooth", "nf4-g64", "nf4-g64-dq", "fp4-g64", "fp8-e4m3-tensor", "fp8-e4m3-row", "fp8-e4m3-128x128",
    "mxfp4", "mxfp8", "nvfp4", "levels[-1,0,1]-tensor", "vectors[1x8:8+8]-row", "vectors[8x1:8]-column-min-perm",
    "spqr-sparse7",
)  # fmt: skip
WHOLE = {
    "gguf": ("q4_0", "q4_1", "q8_0", "q4_k", "q6_k", "iq4_xs", "iq3_s", "tq2_0", "mxfp4", "nvfp4"),
    "onnx": SCHEMES,
}
SHAPE = (256, 256)
Made = tuple[Mapping[str, Tensor], Mapping[str, Any]]  # tensors, and what config.json says beside the model's own
Maker = Callable[[Path], Iterator[Made]]
CHOSEN = re.compile(r"mlp\.(up|down)_proj\.weight")


@dataclass(frozen=True)
class Result:
    """One conversion: `=`, `=w`, the error, or `-`; the reason of a refusal, else the scheme that was written."""

    source: str
    scheme: str
    target: str
    outcome: str
    reason: str = ""
    to: str = ""


def original(path: Path, dtype: torch.dtype) -> Path:
    """A whole model of floats, with its tokenizer."""
    library: Any = transformers
    torch.manual_seed(0)
    sizes = {"hidden_size": SHAPE[1], "intermediate_size": SHAPE[0], "num_hidden_layers": 1, "vocab_size": 260}
    config = library.LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.05)
    library.LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    library.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def quantized(weight: Weight, values: Tensor, act_order: bool) -> QTensor:
    """The weight rounded to nearest, or at random in schemes that no method makes."""
    assert weight.scheme is not None
    if weight.scheme.grid.runs or weight.scheme.zero == "quantized":
        return random_qtensor(weight.scheme, weight.shape)
    plain = replace(weight.scheme, smooth=False)
    codes = torch.empty(view_shape(SHAPE, plain.block), dtype=torch.uint8)
    q = quantize_weight({}, Entry(replace(weight, scheme=plain), "rtn", ""), values.float(), codes, 1 << 20)[1]
    if weight.scheme.smooth:
        return replace(q, scheme=weight.scheme, factors=1 + torch.arange(SHAPE[1]) / SHAPE[1])
    if act_order and q.scales.shape[1] > 1:
        order = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(0))
        q = replace(q, group_index=(order % q.scales.shape[1]).int())
    return q


def stored(form: Format, weight: Weight, values: Tensor, act_order: bool) -> dict[str, Tensor]:
    """A weight as the format has it."""
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in form.layout(weight).items()}
    form.pack(weight, quantized(weight, values, act_order), into)
    if act_order and form.unpack(weight, into, None).group_index is None:
        raise UnsupportedError("there is no place for the order, or one group only")
    return into


def fitted(form: Format, weight: Weight, scheme: str) -> Weight:
    """The weight in a scheme, with its inputs rounded where the format cannot declare it without."""
    chosen = replace(weight, scheme=form.fit(parse(scheme), weight))
    try:
        form.config([chosen], {})
    except UnsupportedError:
        assert chosen.scheme
        return replace(chosen, activations=form.fit_activations(chosen.scheme, chosen), input_scale=0.5)
    return chosen


def packed(source: Path, out: Path, form: Format, scheme: str, act_order: bool) -> None:
    """A checkpoint in a format of safetensors, written without the line.

    Raises:
        UnsupportedError, FormatError: the format does not hold it.
    """
    tensors, weights = dict[str, Tensor](), list[Weight]()
    for name, values in load_file(source / "model.safetensors").items():
        weight = Weight(name, tuple(values.shape), values.dtype)
        if CHOSEN.search(name):
            weight = fitted(form, weight, scheme)
            tensors |= stored(form, weight, values, act_order)
        else:
            tensors[name] = values
        weights.append(weight)
    config = json.loads((source / "config.json").read_text())
    if act_order:
        config |= {"quantization_config": {"desc_act": True}}
    write(source, out, tensors, form.config(weights, config))


def write(source: Path, out: Path, tensors: Mapping[str, Tensor], documents: Mapping[str, Any]) -> None:
    """Files of a checkpoint, its tokenizer among them."""
    out.mkdir()
    for file in source.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document))


def owned(source: Path, root: Path, name: str) -> Iterator[Path]:
    """Checkpoints in a format that is never written, by its owner's package; none where that is not installed."""
    makers: dict[str, Maker] = {"mxfp4": mixture, "torchao": torchao, "quanto": quanto, "auto-round": auto_round}
    with suppress(ModuleNotFoundError):
        for number, (tensors, told) in enumerate(makers[name](source)):
            config = json.loads((source / "config.json").read_text())
            write(source, root / f"{name}-{number}", tensors, {"config.json": {**config, **told}})
            yield root / f"{name}-{number}"


def scheme_of(path: Path) -> str:
    """The scheme of what is quantized."""
    with open_checkpoint(path) as checkpoint:
        return str(next(weight.scheme for weight in checkpoint.weights.values() if weight.scheme))


def loaded(source: Path) -> Any:
    """The model in its class."""
    library: Any = transformers
    return library.LlamaForCausalLM.from_pretrained(source, dtype="auto")


def torchao(source: Path) -> Iterator[Made]:
    """int8, float8, and int4 as torchao's quantizer lays them out, which itself needs a GPU."""
    made, kinds = import_module("torchao.quantization"), ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
    flatten = import_module("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
    told = {"quantization_config": {"quant_method": "torchao"}}

    def chosen(module: torch.nn.Module, name: str) -> bool:
        return CHOSEN.search(f"{name}.weight") is not None

    for kind in kinds:
        model = loaded(source)
        made.quantize_(model, getattr(made, kind)(), filter_fn=chosen)
        yield flatten(model.state_dict())[0], told
    model = loaded(source)
    for name, module in model.named_modules():
        if chosen(module, name):
            module.weight = torch.nn.Parameter(made.Int4Tensor(*int4_parts(module.weight.data)), requires_grad=False)
    yield flatten(model.state_dict())[0], told


def int4_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], torch.Size]:
    """Two signed codes a byte, scales and what is added, in groups of 32 along the row."""
    groups = weight.float().view(len(weight), -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).to(weight.dtype).float()
    codes = (((groups - low) / scale).round().clamp(0, 15) - 8).char().view(weight.shape)
    zero = low + 8 * scale
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    scale, zero = (part.squeeze(-1).T.contiguous().to(weight.dtype) for part in (scale, zero))
    return packed, scale, zero, [1, 32], weight.shape


def quanto(source: Path) -> Iterator[Made]:
    """As `save_pretrained` of optimum-quanto stores them."""
    made = import_module("optimum.quanto")
    for kind in ("qint8", "qfloat8", "qint4"):
        model = loaded(source)
        made.QuantizedModelForCausalLM.quantize(model, weights=kind, include=["*up_proj", "*down_proj"])
        yield {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}, {}


def auto_round(source: Path) -> Iterator[Made]:
    """auto-round's own layout, rounded to nearest, symmetric and not."""
    made, library = import_module("auto_round"), import_module("transformers")
    for symmetric in (True, False):
        tokenizer = library.AutoTokenizer.from_pretrained(source)
        kept = {name: {"bits": 16} for name, module in loaded(source).named_modules()
                if isinstance(module, torch.nn.Linear) and not CHOSEN.search(f"{name}.weight")}  # fmt: skip
        options = {"bits": 4, "group_size": 128, "sym": symmetric, "iters": 0, "disable_opt_rtn": True}
        tuner = made.AutoRound(loaded(source).float(), tokenizer, layer_config=kept, **options)
        with tempfile.TemporaryDirectory() as folder:
            tuner.quantize_and_save(folder, format="auto_round")
            path = next(Path(folder).rglob("config.json")).parent
            tensors = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
            yield tensors, json.loads((path / "config.json").read_text())


def mixture(source: Path) -> Iterator[Made]:
    """A gpt-oss, of which experts alone are quantized, at random."""
    library: Any = transformers
    dice = torch.Generator().manual_seed(0)
    sizes = {"hidden_size": SHAPE[1], "intermediate_size": SHAPE[0], "num_hidden_layers": 1, "vocab_size": 260}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = library.GptOssConfig(**sizes, **heads, num_local_experts=2, num_experts_per_tok=1)
    dtype = next(iter(load_file(source / "model.safetensors").values())).dtype
    tensors = dict(library.GptOssForCausalLM(config).to(dtype).state_dict())
    for name, rows in (("gate_up_proj", 2 * SHAPE[0]), ("down_proj", SHAPE[1])):
        experts, shape = f"model.layers.0.mlp.experts.{name}", (2, rows, SHAPE[1] // 32)
        del tensors[experts]
        tensors[f"{experts}_blocks"] = torch.randint(256, (*shape, 16), generator=dice).byte()
        tensors[f"{experts}_scales"] = torch.randint(115, 125, shape, generator=dice).byte()
    told = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": str(dtype).removeprefix("torch.")}
    yield tensors, {**config.to_dict(), **told}


def sources(model: Path, root: Path, only: str | None) -> Iterator[tuple[str, str, Path]]:
    """Format, scheme and checkpoint; of the schemes that are one in a format one."""
    for name in sorted([*plugins.names("formats"), "auto-round"]):
        if only and name.replace("_", "-") != only.replace("_", "-"):
            continue
        if name in plugins.READ_ONLY or name == "auto-round":
            yield from ((name, scheme_of(path), path) for path in owned(model, root, name))
            continue
        form: Format = plugins.load("formats", name)
        for number, scheme in enumerate(distinct(form, WHOLE.get(name, SCHEMES))):
            for act_order in (False, True) if name.startswith("gptq") and scheme == "int4-g128" else (False,):
                out = root / f"{name}-{number}-{act_order}"
                with suppress(UnsupportedError, FormatError):
                    if form.container == "safetensors":
                        packed(model, out, form, scheme, act_order)
                    else:
                        chosen = {CHOSEN.pattern: scheme, ".": "keep"}
                        lowbit.quantize(model, out, format=name, sets=chosen)
                    yield name, f"{scheme}, act-order" if act_order else scheme, out


def distinct(form: Format, schemes: tuple[str, ...]) -> list[str]:
    """The schemes that a format holds, those that are one in it once."""
    found: dict[str, str] = {}
    for scheme in schemes:
        with suppress(UnsupportedError):
            found.setdefault(str(form.fit(parse(scheme), Weight("m.up_proj.weight", SHAPE, torch.float16))), scheme)
    return list(found.values())


def values(path: Path) -> dict[str, Tensor]:
    """Every weight in float32, those of experts one by one."""
    with open_checkpoint(path) as whole:
        checkpoint = apart(whole, "compressed-tensors")
        return {name: checkpoint.dequantized(name, torch.float32) for name in checkpoint.weights}


def equal(one: Path, other: Path) -> bool:
    """Whether two checkpoints stand for the same quantized weights, to the bit."""
    left, right = values(one), values(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def attempt(name: str, scheme: str, start: Path, target: str, root: Path) -> Result:
    """Convert a checkpoint, and look at the result where that was lossless."""
    there = root / target
    try:
        done = lowbit.convert(start, there, format=target, lossy=True)
    except LowbitError as error:
        return Result(name, scheme, target, "-", short(str(error)))
    to = next((group.after for group in done.groups if group.after), None) or "floats"
    if done.lossless and not equal(start, there):
        raise SystemExit(f"{name} {scheme} to {target} was called lossless, and is not")
    lossy = f"{done.error:.2g}" if done.error else "=w"
    return Result(name, scheme, target, "=" if done.lossless else lossy, "", to)


def short(reason: str) -> str:
    """A refusal without the names of files and weights."""
    text = re.sub(r"^\S*model\S*( \[[\d, ]+\])?: |; (--format .*|no other format) holds it$", "", reason)
    text = re.sub(r"cannot hold \S+: ", "cannot hold it: ", re.sub(r"(/|model\.)\S+", "a weight", text))
    return re.sub(r"\([a-z0-9_, ]{90,}\), \S+ is none", "of llama.cpp, it is none", text)


def results(dtype: torch.dtype, only: str | None) -> Iterator[Result]:
    """All conversions."""
    targets = [name.replace("_", "-") for name in plugins.written()] + ["float"]
    with tempfile.TemporaryDirectory(prefix="lowbit-matrix-") as folder:
        model = original(Path(folder, "model"), dtype)
        for name, scheme, start in sources(model, Path(folder), only):
            print(name, scheme, file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                for target in targets:
                    if target != name.replace("_", "-"):
                        yield attempt(name.replace("_", "-"), scheme, start, target, Path(place))


def table(found: list[Result]) -> str:
    """Markdown: a row for each source, a column for each target, and the reasons."""
    targets = list(dict.fromkeys(each.target for each in found))
    targets.sort(key=lambda name: (name == "float", name))
    reasons = {reason: i for i, reason in enumerate(dict.fromkeys(each.reason for each in found if each.reason), 1)}
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for each in found:
        rows.setdefault((each.source, each.scheme), {})[each.target] = each
    lines = [f"| from | scheme | {' | '.join(targets)} |", "|---|---" + "|---" * len(targets) + "|"]
    for (source, scheme), row in rows.items():
        cells = [cell(row[target], reasons) if target in row else "" for target in targets]
        lines.append(f"| {source} | `{scheme}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def cell(each: Result, reasons: Mapping[str, int]) -> str:
    """The outcome, with the number of its reason."""
    return f"- ({reasons[each.reason]})" if each.reason else each.outcome


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--only", help="one format to convert from")
    parser.add_argument("--json", action="store_true", help="a line for each conversion, as it is done")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for each in results(getattr(torch, args.dtype), args.only):
        found.append(each)
        if args.json:
            print(json.dumps(asdict(each)), flush=True)
    if not args.json:
        print(table(found))


if __name__ == "__main__":
    main()
