"""Conversion: what is lossless and why, what is refused and how, what is carried along."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit import plugins
from lowbit.errors import FormatError, JournalError, ResourceError, UnsupportedError, VerifyError
from lowbit.formats import Weight, awq
from lowbit.schemes import Scheme, parse
from lowbit.stages import _changes, _store
from lowbit.stages._adapter import read_adapter, write_adapter
from lowbit.stages._carry import carried, variants
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.convert import Converted, Group
from lowbit.stages.write import Output
from lowbit.tensors import QTensor
from tests.reference.checkpoints import NAMES, SHAPE, scattered, write_checkpoint
from tests.reference.models import save_tiny
from tests.reference.qtensors import random_qtensor, slow_dequantize

NAME = NAMES[0]
BF16, F16 = torch.bfloat16, torch.float16


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def dequantized(path: Path, name: str = NAME) -> Tensor:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.dequantized(name, torch.float32)


def changed(done: Converted) -> Group:
    """What happened to the quantized weights."""
    (found,) = (group for group in done.groups if group.before)
    return found


def whole_zeros(q: QTensor) -> QTensor:
    assert q.zeros is not None
    return replace(q, zeros=q.zeros.round().clamp(0, 15))


def scales_of(values: list[float]) -> Any:
    """Every scale one of these, in turn."""

    def change(q: QTensor) -> QTensor:
        assert isinstance(q.scales, Tensor)
        return replace(q, scales=torch.tensor(values).repeat(q.scales.numel())[: q.scales.numel()].view(q.scales.shape))

    return change


@pytest.mark.parametrize("shape", [(6, 64), (32, 96), (5, 128)])
@pytest.mark.parametrize(
    "scheme",
    ["int4-g32", "int3-row-asym", "int4-g32-fzero", "int4-g32-min", "int8-tensor", "int4-16x32-asym", "nf4-flat64",
     "fp8-e4m3-4x32", "mxfp4", "nvfp4", "int4-flat48-asym", "nf4-g64-dq"],
)  # fmt: skip
def test_rows_are_those_of_the_slow_definition(scheme: str, shape: tuple[int, int]) -> None:
    q = random_qtensor(parse(scheme), shape)
    q = scattered(q) if scheme == "int4-g32" and shape[1] % 32 == 0 else q
    wanted = slow_dequantize(q)
    found = torch.cat([q.rows(at, min(at + 4, shape[0])) for at in range(0, shape[0], 4)])
    assert torch.equal(bits_of(found), bits_of(wanted))


@pytest.mark.parametrize(
    ("scheme", "into"),
    [
        ("int4-row", "int4-g32"), ("int4-tensor-asym", "int4-g32-asym"), ("fp8-e4m3-16x32", "fp8-e4m3-g32"),
        ("int4-g64", "int4-flat32"), ("nf4-flat64", "nf4-g32"), ("nf4-flat128", "nf4-row"), ("int3-g64", "int8-g64"),
        ("int3-g64-asym", "int5-g64-asym"), ("int4-g64", "int4-g64-asym"), ("int4-g64-asym", "int4-g64-fzero"),
        ("mxfp4", "mxfp8"), ("mxfp4", "fp8-e4m3-g32"), ("nvfp4", "fp8-e4m3-g16"), ("nf4-g64-dq", "nf4-g64"),
        ("int4-g64-bf16", "int4-g64-f32"), ("int8-tensor", "int8-16x64"), ("int4-g64", "int4-g32-min"),
        ("int4-g64-asym", "int4-g64-min"), ("int3-g64-min", "int5-g32-min"), ("q4_k", "int4-g32-min"), ("q4_k", "q4_k"),
    ],
)  # fmt: skip
def test_values_stay_to_the_bit(scheme: str, into: str) -> None:
    q = random_qtensor(parse(scheme), (32, 128))
    wanted = slow_dequantize(q)
    target = replace(parse(into), scale="f32") if parse(into).scale not in ("e8m0",) else parse(into)
    made = carried(q, target)
    assert made.scheme == target
    assert torch.equal(bits_of(slow_dequantize(made)), bits_of(wanted))


@pytest.mark.parametrize(
    ("scheme", "into", "words"),
    [
        ("int4-g32", "int4-g64", "not whole blocks"),
        ("int4-g32", "int4-row", "not whole blocks"),
        ("int4-16x32", "int4-flat64", "not whole blocks"),
        ("int4-32x32", "int4-flat132", "not whole blocks"),  # both ends of each run lie in one block, its middle not
        ("int4-g64-asym", "int4-g64", "zero points are not all 8"),
        ("int4-g64-fzero", "int4-g64-asym", "no whole number from 0 to 15"),
        ("int4-g64", "int3-g64", "no level -8"),
        ("nf4-g64", "int4-g64-f32", "no level"),
        ("int4-g64-f32", "int4-g64-f16", "is no float16"),
        ("int4-g64", "int4-g64-bf16", "is no bfloat16"),
        ("nvfp4", "mxfp4", "not whole blocks"),
        ("fp8-e4m3-g16-f32", "nvfp4", "not quantized"),
        ("int4-g64-min", "int4-g64-asym", "minima that are no multiples|no whole number"),
        ("int4-g32-asym", "int4-g32-min", "minimum .* is no float16"),
    ],
)
def test_what_does_not_fit_is_said(scheme: str, into: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        carried(random_qtensor(parse(scheme), (32, 128)), parse(into))


@pytest.mark.parametrize("zero", ["int4-g64", "int4-g64-asym"])
def test_minima_that_are_multiples_of_scales_are_zero_points_again(zero: str) -> None:
    q = random_qtensor(parse(zero), (32, 128))
    there = carried(q, replace(parse("int4-g64-min"), scale="f32"))
    back = carried(there, q.scheme)
    assert torch.equal(bits_of(slow_dequantize(back)), bits_of(slow_dequantize(q)))
    assert torch.equal(back.codes, q.codes)
    assert q.zeros is None or (back.zeros is not None and torch.equal(back.zeros, q.zeros))


def test_act_order_goes_into_no_other_blocks() -> None:
    q = scattered(random_qtensor(parse("int4-g64"), (32, 128)))
    with pytest.raises(UnsupportedError, match="act-order"):
        carried(q, parse("int4-g32"))


@pytest.mark.parametrize("scheme", ["int4-g128", "int3-g64-asym", "nf4-g64-dq", "nvfp4", "fp8-e4m3-tensor"])
def test_schemes_are_tried_from_the_least_change_on(scheme: str) -> None:
    found = list(variants(parse(scheme)))
    assert found[0] == parse(scheme)
    assert all(parse(str(each)) == each for each in found)
    assert len(set(found)) == len(found) < 500


def test_bfloat16_scales_go_into_float16_where_they_are_exact(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "in", "compressed-tensors", {NAME: "int4-g64"}, BF16, scales_of([0.0123291015625, 2.0**-16])
    )
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq")
    assert done.lossless and "scales in f16, exact" in str(done.groups)
    assert torch.equal(dequantized(tmp_path / "out"), dequantized(tmp_path / "in"))
    back = lowbit.convert(tmp_path / "out", tmp_path / "back", format="compressed-tensors")
    assert back.lossless and "int4-g64-bf16" in str(back.groups)


def test_float16_scales_stay_in_a_bfloat16_model(tmp_path: Path) -> None:
    """Eight-bit weights of eetq have no float type of their own: that of their scales is tried."""
    write_checkpoint(tmp_path / "in", "eetq", {NAME: "int8-row"}, BF16)
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="compressed-tensors")
    assert done.lossless and "scales stay f16, which readers may cast" in str(done.groups)


def test_bfloat16_scales_that_float16_does_not_have_are_refused_and_rounded_when_asked(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "in", "compressed-tensors", {NAME: "int4-g64"}, BF16, scales_of([1.0, 2.0**-18 + 2.0**-25])
    )
    with pytest.raises(UnsupportedError, match=r"the scale 3\.8444\d*e-06 is no float16.*--lossy"):
        lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq", lossy=True)
    wanted, found = dequantized(tmp_path / "in").double(), dequantized(tmp_path / "out").double()
    assert changed(done).method == "round"
    assert done.error == pytest.approx(float((found - wanted).square().sum() / wanted.square().sum()), rel=1e-6)
    assert done.largest == float((found - wanted).abs().max()) > 0


def test_float_zero_points_that_happen_to_be_whole_are_integers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "hqq", {NAME: "int4-g64"}, change=whole_zeros)
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq_v2")
    assert done.lossless and changed(done).after == "int4-g64-asym"
    write_checkpoint(tmp_path / "other", "hqq", {NAME: "int4-g64"})
    with pytest.raises(UnsupportedError, match="zero points are integers"):
        lowbit.convert(tmp_path / "other", tmp_path / "nowhere", format="gptq_v2")


def test_requantizing_has_the_error_that_it_says(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "bitsandbytes", {NAME: "nf4-g64"})
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq", lossy=True)
    wanted, found = dequantized(tmp_path / "in").double(), dequantized(tmp_path / "out").double()
    assert changed(done).method == "mse" and changed(done).after == "int4-g64"
    assert done.error == pytest.approx(float((found - wanted).square().sum() / wanted.square().sum()), rel=1e-5)
    assert done.largest == pytest.approx(float((found - wanted).abs().max()), rel=1e-6)
    assert 0 < done.error < 0.1


def test_a_scheme_that_is_asked_for_is_made(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g64"})
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="compressed-tensors", scheme="int8-g64")
    assert done.lossless and changed(done).after == "int8-g64", "4 bits are levels of 8"
    with pytest.raises(UnsupportedError, match="int3"):
        lowbit.convert(tmp_path / "in", tmp_path / "no", format="compressed-tensors", scheme="int3-g64")
    done = lowbit.convert(tmp_path / "in", tmp_path / "three", format="gptq", scheme="int3-g64", lossy=True)
    assert changed(done).after == "int3-g64" and done.error > 0


def test_act_order_is_kept_where_there_is_a_place_and_else_refused(tmp_path: Path) -> None:
    settings = {"quantization_config": {"desc_act": True}}
    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g64"}, change=scattered, config=settings)
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq_v2")
    assert done.lossless
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["desc_act"] is True
    assert torch.equal(dequantized(tmp_path / "out"), dequantized(tmp_path / "in"))
    for other in ("compressed-tensors", "hqq"):
        with pytest.raises(UnsupportedError, match="act-order"):
            lowbit.convert(tmp_path / "in", tmp_path / other, format=other)


@pytest.mark.parametrize("scheme", ["f32", None, "bf16"])
def test_dequantized_weights_say_whether_their_type_holds_them(scheme: str | None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g64"})
    if scheme != "f32":
        with pytest.raises(UnsupportedError, match="does not have its values; --scheme f32 does"):
            lowbit.convert(tmp_path / "in", tmp_path / "out", format="float", scheme=scheme)
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="float", scheme=scheme, lossy=scheme != "f32")
    dtype = {"f32": torch.float32, None: F16, "bf16": BF16}[scheme]
    stored = load_file(tmp_path / "out/model.safetensors")[NAME]
    wanted = dequantized(tmp_path / "in")
    assert stored.dtype == dtype and torch.equal(bits_of(stored), bits_of(wanted.to(dtype)))
    assert done.lossless == (scheme == "f32") and done.largest == float((stored.float() - wanted).abs().max())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(("last", "dtype"), [(1, F16), (7, BF16)])
def test_the_first_float_type_that_has_every_value(
    last: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first runs the second of two types has all; where not in the last, the error is that of the first."""

    def change(q: QTensor) -> QTensor:
        codes = torch.full_like(q.codes, 8 + 1)
        codes[-1] = 8 + last
        return replace(q, codes=codes, scales=torch.full_like(q.scales, 1 + 2**-9))  # type: ignore[arg-type]

    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g64-f16"}, change=change, config={"torch_dtype": "bfloat16"})
    monkeypatch.setattr(_changes, "_FLOATS", 2 * SHAPE[1])
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="float", lossy=True)
    wanted, stored = dequantized(tmp_path / "in"), load_file(tmp_path / "out/model.safetensors")[NAME]
    assert stored.dtype == dtype and done.lossless == (dtype == F16) and SHAPE[0] > 4
    apart = (stored.float() - wanted).double()
    assert done.error == pytest.approx(float(apart.square().sum() / stored.double().square().sum()))
    assert done.largest == float(apart.abs().max())


def test_powers_of_two_are_exact_in_half_precision(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g64"}, change=scales_of([0.5, 0.125]))
    assert lowbit.convert(tmp_path / "in", tmp_path / "out", format="float").lossless


def test_a_float_checkpoint_is_copied(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = {NAME: torch.randn(SHAPE).bfloat16(), "ids": torch.arange(4)}
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq")
    assert done.lossless and done.largest == 0 and not any(group.before for group in done.groups)
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def activated(path: Path, scheme: str, inputs: str, scale: float | None = None) -> None:
    write_checkpoint(path, "compressed-tensors", {NAME: scheme}, inputs=(parse(inputs), scale))


@pytest.mark.parametrize(("inputs", "scale"), [("int8-row", None), ("int8-tensor", 0.25)])
def test_activations_are_carried_or_refused(inputs: str, scale: float | None, tmp_path: Path) -> None:
    activated(tmp_path / "in", "int8-row", inputs, scale)
    done = lowbit.convert(tmp_path / "in", tmp_path / "same", format="compressed-tensors")
    assert done.lossless
    with open_checkpoint(tmp_path / "in") as before, open_checkpoint(tmp_path / "same") as after:
        assert after.weights[NAME] == before.weights[NAME] and after.weights[NAME].input_scale == scale
    with pytest.raises(UnsupportedError, match=r"inputs are no longer rounded.*cannot declare activations"):
        lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq")
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq", lossy=True)
    assert done.largest == 0 and not done.lossless
    assert torch.equal(dequantized(tmp_path / "in"), dequantized(tmp_path / "out"))


def test_configuration_and_files_are_carried_and_outdated_ones_are_not(tmp_path: Path) -> None:
    start = tmp_path / "in"
    write_checkpoint(start, "gptq", {NAME: "int4-g64"}, config={"text_config": {"quantization_config": {"x": 1}}})
    for name in ("tokenizer.json", "report.html", "lowbit-plan.json"):
        (start / name).write_text("{}")
    down, up = torch.ones(2, SHAPE[1]), torch.full((SHAPE[0], 2), 0.5)
    write_adapter(start / "adapter", {NAME: (down, up)}, str(start), BF16)
    assert (start / "quantize_config.json").exists()
    lowbit.convert(start, tmp_path / "out", format="compressed-tensors")
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {"tokenizer.json", "lowbit-plan.json", "adapter/adapter_model.safetensors"} <= names
    assert not {"quantize_config.json", "report.html"} & names
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors" and config["model_type"] == "llama"
    assert config["text_config"] == {}
    assert torch.equal(read_adapter(tmp_path / "out/adapter")[NAME][1], up)
    owner = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert owner["base_model_name_or_path"] == str(tmp_path / "out")


def test_transposed_layers_stay_where_readers_know_them(tmp_path: Path) -> None:
    name, settings = "transformer.h.0.attn.c_attn.weight", {"model_type": "gpt2"}
    meant = write_checkpoint(tmp_path / "in", "gptq", {name: "int4-g64"}, config=settings)[name]
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq_v2")
    assert done.lossless and torch.equal(dequantized(tmp_path / "out", name), slow_dequantize(meant).T)
    with pytest.raises(UnsupportedError, match="Conv1D"):
        lowbit.convert(tmp_path / "in", tmp_path / "no", format="compressed-tensors", lossy=True)
    lowbit.convert(tmp_path / "in", tmp_path / "floats", format="float", scheme="f32")
    assert torch.equal(load_file(tmp_path / "floats/model.safetensors")[name], slow_dequantize(meant).T)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"format": "no-such"}, UnsupportedError, "no format is called"),
        ({"format": "gptq", "scheme": "int99"}, lowbit.LowbitError, "no scheme is called"),
        ({"format": "float", "scheme": "int4"}, UnsupportedError, "f16, bf16 or f32"),
        ({"format": "gptq_v2", "ram": "1MiB"}, ResourceError, "at least"),
    ],
)
def test_mistakes_end_before_anything_is_written(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g64"})
    with pytest.raises(error, match=words):
        lowbit.convert(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gptq", dict.fromkeys(NAMES, "int4-g64"))
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors[NAMES[1].replace("weight", "scales")][0, 3] = float("nan")
    save_file(tensors, tmp_path / "in/model.safetensors")
    with pytest.raises(FormatError, match=r"down_proj\.scales holds nan"):
        lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq_v2", lossy=True)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_else_and_the_input_itself_are_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g64"})
    before = sorted((file.name, file.read_bytes()) for file in (tmp_path / "in").iterdir())
    with pytest.raises(JournalError, match="holds something else"):
        lowbit.convert(tmp_path / "in", tmp_path / "in", format="gptq_v2")
    assert sorted((file.name, file.read_bytes()) for file in (tmp_path / "in").iterdir()) == before
    lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq_v2")  # which has a journal
    before = sorted((file.name, file.read_bytes()) for file in (tmp_path / "out").glob("[!.]*"))
    with pytest.raises(JournalError, match="out is the checkpoint that is read; name another directory"):
        lowbit.convert(tmp_path / "out", tmp_path / "in" / ".." / "out", format="gptq")
    assert sorted((file.name, file.read_bytes()) for file in (tmp_path / "out").glob("[!.]*")) == before


def test_memory_that_is_short_is_made_up_for_by_files_without_a_name(tmp_path: Path) -> None:
    """The least limit that is offered: everything large in scratch files, and the same bytes come out."""
    write_checkpoint(tmp_path / "in", "bitsandbytes", {NAME: "nf4-g64"}, shape=(512, 1024))
    with pytest.raises(ResourceError, match="at least"):
        lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq", lossy=True, ram="1MiB")
    lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq", lossy=True)
    from lowbit.budget import MARGIN, anonymous_bytes

    ram = anonymous_bytes() + MARGIN + 32 * (1 << 19) + (1 << 20)
    lowbit.convert(tmp_path / "in", tmp_path / "small", format="gptq", lossy=True, ram=ram)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "small"))
    assert one == other
    assert {file.name for file in tmp_path.iterdir()} == {"in", "out", "small"}


@pytest.mark.parametrize(("name", "into", "scheme", "cols"), [
    ("gptq_v2", "compressed_tensors", "int4-g128-asym", 128), ("awq", "gptq_v2", "int4-g128-asym", 128),
    ("compressed_tensors", "awq", "int4-g128-asym", 128), ("compressed_tensors", "gptq", "int3-g128", 128),
    ("compressed_tensors", "awq", "int4-row", 122), ("awq", "compressed_tensors", "int4-g128-asym", 128),
    ("gptq_v2", "awq", "int4-g128-asym", 128), ("gptq", "mlx", "int4-g128", 128),
])  # fmt: skip
def test_panels_of_rows_make_the_whole(
    name: str, into: str, scheme: str, cols: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several panels, the last of fewer rows: values by the slow definition, and the same files from one panel."""
    meant = write_checkpoint(tmp_path / "in", name, {NAME: scheme}, shape=(288, cols))
    lowbit.convert(tmp_path / "in", tmp_path / "one", format=into)
    monkeypatch.setattr(_store, "_PANEL", 2**14)
    assert lowbit.convert(tmp_path / "in", tmp_path / "out", format=into).largest == 0
    assert torch.equal(dequantized(tmp_path / "out"), slow_dequantize(meant[NAME]).view(288, cols))
    files = ("model.safetensors", ".lowbit/journal.jsonl")
    (one, journal), (many, other) = ([(tmp_path / at / file).read_bytes() for file in files] for at in ("one", "out"))
    assert one == many and digests(journal) == digests(other)


def test_what_is_beyond_the_codes_of_a_row_does_not_count(tmp_path: Path) -> None:
    """The last word of each row has room for six codes more, which nobody reads."""
    meant = write_checkpoint(tmp_path / "in", "compressed_tensors", {NAME: "int4-row"}, shape=(32, 122))
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name][:, -1] ^= -(2**8)
    save_file(tensors, path)
    lowbit.convert(tmp_path / "in", tmp_path / "out", format="awq")
    assert torch.equal(dequantized(tmp_path / "out"), slow_dequantize(meant[NAME]).view(32, 122))


@pytest.mark.parametrize("cols", [128, 256])
def test_codes_of_gemv_go_over_where_their_shape_is_that_of_gemm(cols: int) -> None:
    """A square weight's qweight has one shape in both versions."""
    weight = Weight("m.weight", (128, cols), F16, parse("int4-g128-asym-f16"))
    codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8)
    words = (codes.view(128, -1, 8).long() << torch.arange(0, 32, 4)).sum(-1).int()
    zeros, scales = torch.zeros(128, 1, dtype=torch.int32), torch.ones(128, 8, dtype=F16)
    tensors = {"m.qweight": words, "m.qzeros": zeros, "m.scales": scales}
    rows, lines = torch.empty(32, cols // 8, dtype=torch.int32), torch.empty(cols // 8, 128, dtype=torch.int32)
    assert awq.FORMAT.codes is not None and awq.FORMAT.codes.turned is not None
    awq.FORMAT.codes.rows.unpack(weight, tensors, 64, rows)
    awq.FORMAT.codes.turned.unpack(weight, tensors, 0, lines)
    assert torch.equal(rows, words[64:96]) and torch.equal(lines, words.T)


@pytest.mark.parametrize("scheme", ["int8-tensor", "int8-row", "int4-g32-asym", "int4-16x32"])
def test_floats_in_runs_make_the_whole(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several panels, and blocks that lie in more than one."""
    meant = write_checkpoint(tmp_path / "in", "compressed_tensors", {NAME: scheme}, shape=(288, 128))
    monkeypatch.setattr(_store, "_PANEL", 2**14)
    monkeypatch.setattr(_changes, "_FLOATS", 2**12)
    lowbit.convert(tmp_path / "in", tmp_path / "out", format="float", scheme="f32")
    assert torch.equal(dequantized(tmp_path / "out"), slow_dequantize(meant[NAME]).view(288, 128))


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_what_a_disk_did_to_floats_is_named(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made some rows at a time, and once more to say which differs."""
    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g128"}, shape=(288, 128))
    monkeypatch.setattr(_store, "_PANEL", 2**14)
    monkeypatch.setattr(_changes, "_FLOATS", 2**12)
    lowbit.convert(tmp_path / "in", tmp_path / "whole", format="float", scheme=dtype, lossy=True)
    element, write, size = 200 * 128 + 5, Output.write, 4 if dtype == "f32" else 2

    def damaged(output: Output, name: str, data: memoryview, at: int = 0) -> None:
        write(output, name, data, at)
        if name == NAME and at <= size * element < at + len(data):
            write(output, name, memoryview(bytes([data[size * element - at] ^ 1])), size * element)

    monkeypatch.setattr(Output, "write", damaged)
    with pytest.raises(VerifyError, match=rf"differs from what was meant in element {element} of its weight: "):
        lowbit.convert(tmp_path / "in", tmp_path / "out", format="float", scheme=dtype, lossy=True)


def digests(journal: bytes) -> list[tuple[Any, Any]]:
    return sorted((str(line["meant"]), str(line["stored"])) for line in map(json.loads, journal.splitlines()[1:]))


@pytest.mark.parametrize("element", [0, 287 * 128])
def test_what_a_disk_did_to_a_panel_is_named(element: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "in", "gptq", {NAME: "int4-g128"}, shape=(288, 128))
    write = Output.write

    def damaged(output: Output, name: str, data: memoryview, at: int = 0) -> None:
        write(output, name, data, at)
        if name.endswith("weight_packed"):
            write(output, name, memoryview(bytes([data[element // 2] ^ 1])), element // 2)

    monkeypatch.setattr(Output, "write", damaged)
    monkeypatch.setattr(_store, "_PANEL", 2**14)
    with pytest.raises(VerifyError, match=rf"differs from what was meant in element {element} of its codes: "):
        lowbit.convert(tmp_path / "in", tmp_path / "out", format="compressed_tensors")


def test_schemes_of_others_are_read(tmp_path: Path) -> None:
    """A map of double quantization that is not the usual one has no name, and goes over as it is."""
    nested = parse("nf4-g64-dq").nested
    assert nested is not None
    own = replace(nested, grid=replace(nested.grid, name="dynamic8-of-file", levels=tuple(sorted(
        {*nested.grid.levels[:-1], 0.99}))))  # fmt: skip
    scheme: Scheme = replace(parse("nf4-flat64-dq"), nested=own)
    write_checkpoint(tmp_path / "in", "bitsandbytes", {NAME: scheme})
    done = lowbit.convert(tmp_path / "in", tmp_path / "out", format="bitsandbytes")
    assert done.lossless and torch.equal(dequantized(tmp_path / "out"), dequantized(tmp_path / "in"))


def test_the_order_that_compressed_tensors_declared_is_declared_to_readers_of_gptq(tmp_path: Path) -> None:
    """Without `desc_act` some readers do not look at g_idx."""
    start = tmp_path / "in"
    meant = write_checkpoint(start, "compressed-tensors", {NAME: "int4-g64"})[NAME]
    tensors, config = load_file(start / "model.safetensors"), json.loads((start / "config.json").read_text())
    order = scattered(meant).group_index
    assert order is not None
    save_file(tensors | {NAME.replace("weight", "weight_g_idx"): order}, start / "model.safetensors")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (start / "config.json").write_text(json.dumps(config))
    assert lowbit.convert(start, tmp_path / "out", format="gptq").lossless
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["desc_act"] is True
    assert torch.equal(dequantized(tmp_path / "out"), slow_dequantize(scattered(meant)))


@pytest.mark.parametrize(("scheme", "chosen"), [("fp8-e4m3-row", "int8-g128-min"), ("nvfp4", "int4-g32-min")])
def test_coarser_scales_are_not_taken_for_the_sake_of_the_grid(scheme: str, chosen: str, tmp_path: Path) -> None:
    """MLX has both grids, under powers of two: with as many bits integers err less."""
    write_checkpoint(tmp_path / "in", "compressed_tensors", {NAME: scheme}, shape=(32, 128))
    lowbit.convert(tmp_path / "in", tmp_path / "out", format="mlx", lossy=True)
    assert str(open_checkpoint(tmp_path / "out").weights[NAME].scheme).startswith(chosen)


@pytest.mark.parametrize("form", ["compressed_tensors", "gptq", "fbgemm_fp8", "bitsandbytes"])
def test_codes_that_nothing_declares_are_refused_by_all(tmp_path: Path, form: str) -> None:
    scheme = {"fbgemm_fp8": "fp8-e4m3-row", "bitsandbytes": "nf4-g64"}.get(form, "int4-g32")
    write_checkpoint(tmp_path / "in", form, {NAMES[0]: scheme})
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "text").write_text("Some words.")
    calls = (
        lambda: lowbit.convert(tmp_path / "in", tmp_path / "out", format="gptq"),
        lambda: lowbit.quantize(tmp_path / "in", tmp_path / "out"),
        lambda: lowbit.quantize(tmp_path / "in", tmp_path / "out", requantize=True),
        lambda: lowbit.evaluate(tmp_path / "in", tmp_path / "text"),
        lambda: lowbit.load(tmp_path / "in"),
    )
    for call in calls:
        with pytest.raises(UnsupportedError, match=r"matrices of codes, as .*nothing says how to read them"):
            call()
    assert not (tmp_path / "out").exists()


def test_the_largest_file_may_be_named_from_python(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "in")
    lowbit.quantize(tmp_path / "in", tmp_path / "q", scheme="int4-g16", shard_size="10KB")
    lowbit.convert(tmp_path / "q", tmp_path / "out", format="hqq", shard_size=10_000)
    for name in ("q", "out"):
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2


def test_an_unknown_format_is_answered_with_those_that_are_written(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "in")
    with pytest.raises(UnsupportedError, match="no format is called 'nope'") as error:
        lowbit.convert(tmp_path / "in", tmp_path / "out", format="nope")
    assert "gptq_v2" in str(error.value) and not any(name in str(error.value) for name in plugins.READ_ONLY)


def test_masks_of_attention_are_no_codes(tmp_path: Path) -> None:
    """As GPT-NeoX's checkpoints have them, of bytes with four axes."""
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file({NAME: torch.ones(8, 8), "gpt_neox.layers.0.attention.bias": mask}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as source:
        assert source.unexplained is None
