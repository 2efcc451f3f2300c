"""What the format `bitsandbytes` refuses, how it declares a model, and which damage it notices."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Spec, Weight
from lowbit.formats.bitsandbytes import FORMAT
from lowbit.schemes import parse
from lowbit.tensors import QTensor
from tests.reference.qtensors import random_qtensor

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
DECLARED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def weight(module: str = MODULE, shape: tuple[int, ...] = (64, 128), scheme: str | None = None) -> Weight:
    bare = Weight(f"{module}.weight", shape, torch.bfloat16)
    return replace(bare, scheme=FORMAT.fit(parse(scheme), bare)) if scheme else bare


def packed(planned: Weight, q: QTensor) -> dict[str, Tensor]:
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in FORMAT.layout(planned).items()}
    FORMAT.pack(planned, q, into)
    return into


def stored(planned: Weight) -> dict[str, Tensor]:
    assert planned.scheme is not None
    return packed(planned, random_qtensor(planned.scheme, planned.shape))


@pytest.mark.parametrize(
    ("scheme", "shape", "fitted"),
    [
        ("nf4", (64, 128), "nf4-g64"),
        ("nf4-g128-dq", (64, 128), "nf4-g128-dq"),
        ("nf4-g64-dq", (3, 100), "nf4-flat64-dq"),
        ("fp4-row-f16", (64, 128), "fp4-g128"),
        ("nf4-g64", (3, 100), "nf4-flat64"),
        ("int8", (64, 100), "int8-row-bf16"),
        ("int8-row-f32", (64, 100), "int8-row-bf16"),
        ("int8-g100", (64, 100), "int8-row-bf16"),
    ],
)
def test_fit_says_how_it_is_stored(scheme: str, shape: tuple[int, int], fitted: str) -> None:
    assert FORMAT.fit(parse(scheme), weight(shape=shape)) == parse(fitted)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ("int4-g64", (64, 128), "nf4, fp4 and int8"),
        ("int8-g64", (64, 128), "use int8-row"),
        ("int8-row-asym", (64, 128), "use int8-row"),
        ("nf4-g48", (64, 96), "use g64"),
        ("nf4-row", (64, 96), "use g64"),
        ("nf4-tensor", (64, 128), "use g64"),
        ("nf4-g64", (64, 96), "AVX-512; use g32"),
        ("nf4-g64", (128,), "--skip"),
    ],
)
def test_fit_refuses_with_what_works(scheme: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        FORMAT.fit(parse(scheme), weight(shape=shape))


def test_scales_of_rows_come_back_to_the_bit() -> None:
    """Every bfloat16 that a scale can be, times 127, divides back."""
    values = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    values = values[(values * 127).isfinite()].reshape(-1, 1)
    planned = weight(shape=(len(values), 1), scheme="int8-row")
    assert planned.scheme is not None
    q = QTensor(planned.scheme, planned.shape, torch.zeros(planned.shape, dtype=torch.uint8), values)
    assert torch.equal(FORMAT.unpack(planned, packed(planned, q), None).scale_values(), values)


def test_a_scale_that_no_stored_number_gives_is_refused() -> None:
    planned = replace(weight(shape=(128, 1)), scheme=parse("int8-row-f32"))
    assert planned.scheme is not None
    scales = 1 + torch.arange(128).reshape(-1, 1) * 2.0**-23
    scales[:, 0] *= 1.5
    q = QTensor(planned.scheme, planned.shape, torch.zeros(planned.shape, dtype=torch.uint8), scales)
    wrong = [row for row in range(128) if not _reachable(scales[row])]
    assert len(wrong) in (1, 2)
    with pytest.raises(FormatError, match=rf"{MODULE}\.SCB: the scale 1\.5\d* of row {wrong[0]} "):
        FORMAT.pack(
            planned, q, {name: torch.empty(s.shape, dtype=s.dtype) for name, s in FORMAT.layout(planned).items()}
        )


def _reachable(scale: Tensor) -> bool:
    """Whether some float32 within 8 steps of 127 times the scale divides back to it."""
    bits = (scale * 127).view(torch.int32) + torch.arange(-8, 9, dtype=torch.int32)
    return bool((bits.view(torch.float32) / 127 == scale).any())


def test_config() -> None:
    weights = [weight(scheme="nf4-dq"), weight("a.b", scheme="fp4"), weight("c.d", scheme="nf4-dq"), weight("c.kept")]
    declared = FORMAT.config(weights, {"model_type": "llama"})["config.json"]["quantization_config"]
    assert declared == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["c.kept", "lm_head"],
        "llm_int8_threshold": 6.0,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    rows = FORMAT.config([weight("lm_head", scheme="int8-row")], {})["config.json"]["quantization_config"]
    assert (rows["load_in_8bit"], rows["llm_int8_skip_modules"]) == (True, [])


def test_four_and_eight_bits_do_not_go_together() -> None:
    with pytest.raises(UnsupportedError, match="as a whole"):
        FORMAT.config([weight(scheme="nf4"), weight("a.b", scheme="int8-row")], {})


def recognised(tensors: dict[str, Tensor]) -> dict[str, Weight]:
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = FORMAT.recognise(DECLARED, specs, tensors.__getitem__)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [64]}, "makes no sense"),
        ({"shape": [64, -128]}, "makes no sense"),
        ({"blocksize": 0}, "makes no sense"),
        ({"dtype": "int8"}, "makes no sense"),
        ({"nested_offset": float("nan")}, "makes no sense"),
        ({"shape": "wide"}, "makes no sense"),
        ({"blocksize": "64"}, "makes no sense"),
    ],
)
def test_a_state_that_lies_is_refused(change: dict[str, Any], reason: str) -> None:
    tensors = stored(weight(scheme="nf4-dq"))
    state = json.loads(bytes(tensors[STATE].tolist())) | change
    tensors[STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(FormatError, match=rf"{STATE} .*{reason}"):
        recognised(tensors)


def test_another_table_is_refused() -> None:
    planned = weight(scheme="nf4")
    tensors = stored(planned)
    tensors[f"{NAME}.quant_map"][3] = 0.5
    with pytest.raises(FormatError, match="quant_map is not nf4's table"):
        FORMAT.unpack(planned, tensors, None)


def test_an_order_for_one_gpu_is_refused() -> None:
    planned = weight(scheme="int8-row")
    tensors = stored(planned) | {f"{MODULE}.weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(FormatError, match="weight_format is 2"):
        FORMAT.unpack(planned, tensors, None)


def test_rows_of_any_scale_are_written_again_as_they_were() -> None:
    """Rows that others wrote have float32 scales; those divide back, since they were divided once."""
    planned = weight(scheme="int8-row")
    tensors = stored(planned)
    tensors[f"{MODULE}.SCB"].copy_(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5)
    known = recognised(tensors)[NAME]
    assert known.scheme == parse("int8-row-f32")
    q = FORMAT.unpack(known, tensors, None)
    again = FORMAT.unpack(known, packed(known, q), None)
    assert torch.equal(again.scale_values(), q.scale_values())
