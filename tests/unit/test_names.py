"""What names say: a table written by hand, a name a row; and where a name and what it names say different things."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.inspect import inspect
from lowbit.inspect.container import sniff
from lowbit.inspect.names import decode, names_table
from tests.unit.test_inspect import packed_checkpoint

# Name; what it says, `?` after what is so by default and `??` after what is not sure; a word of each warning.
NAMES = [
    ("llama-7b-fp16.bin", "model=llama? size=7b grid=f16 bits=16 container=pytorch", []),
    ("bert-base-int8.onnx", "model=bert? variant=base bits=8 container=onnx", []),
    ("mistral-7b-int4.bin", "model=mistral? size=7b bits=4 container=pytorch", []),
    ("llama-7b-GPTQ-4bit.safetensors", "model=llama? size=7b method=gptq bits=4 group=128? container=safetensors", []),
    ("llama-7b-GPTQ-4bit-128g.bin", "model=llama? size=7b method=gptq bits=4 group=128 container=pytorch", []),
    ("llama-7b-q4_k.gguf", "model=llama? size=7b method=ggml type=q4_k bits=4 bits_per_weight=4.5 container=gguf", []),
    (
        "mistral-7b-NF4.gguf",
        "model=mistral? size=7b method=bitsandbytes?? grid=nf4 bits=4 group=64? container=gguf??",
        ["NF4"],
    ),
    ("llama-13b-AWQ.bin", "model=llama? size=13b method=awq bits=4? group=128? symmetric=False? container=pytorch", []),
    (
        "llama-13b-awq-quant4.safetensors",
        "model=llama? size=13b method=awq bits=4 group=128? symmetric=False? container=safetensors",
        [],
    ),
    (
        "phi-2-EETQ-4bit.safetensors",
        "model=phi? version=2? method=eetq?? bits=4?? group=row? activation_bits=16? container=safetensors",
        ["Easy & Efficient"],
    ),
    ("bert-MQ-int8-fp16.pt", "model=bert? method=mixed grid=f16 bits=8+16 container=pytorch", []),
    ("mixtral-8x7b-w4a16.pt", "model=mixtral? size=8x7b bits=4 activation_bits=16 container=pytorch", []),
    ("llama-7b-w8a16-quant.bin", "model=llama? size=7b bits=8 activation_bits=16 quantized=True container=pytorch", []),
    (
        "TheBloke/Llama-2-13B-GPTQ-4bit-128g",
        "publisher=TheBloke model=Llama? version=2? size=13b method=gptq bits=4 group=128",
        [],
    ),
    (
        "TheBloke/Mistral-7B-v0.1-AWQ",
        "publisher=TheBloke model=Mistral? version=v0.1 size=7b method=awq bits=4? group=128? symmetric=False?",
        [],
    ),
    ("model-name-int8.pt", "model=model-name? bits=8 container=pytorch", []),
    ("model-name-static-quant.pt", "model=model-name? method=static bits=8?? container=pytorch", []),
    (
        "mobilenet_v2_1.0_224_quant.tflite",
        "model=mobilenet? version=v2 width=1.0 resolution=224 quantized=True bits=8? container=tflite",
        [],
    ),
    ("resnet50-v1-12-int8.onnx", "model=resnet50? version=v1 opset=12 bits=8 container=onnx", []),
    (
        "llama-2-7b.q4_0.gguf",
        "model=llama? version=2? size=7b method=ggml type=q4_0 bits=4 group=32 bits_per_weight=4.5 container=gguf",
        [],
    ),
    (
        "mistral-7b-v0.1.Q5_K_M.gguf",
        "model=mistral? version=v0.1 size=7b method=ggml type=q5_k mixture=m bits=5 bits_per_weight=5.5 container=gguf",
        [],
    ),
    (
        "llama-2-7b-chat.q4_K_M.gguf",
        (
            "model=llama? version=2? size=7b variant=chat method=ggml type=q4_k mixture=m bits=4 bits_per_weight=4.5 "
            "container=gguf"
        ),
        [],
    ),
    (
        "phi-2-EETQ-W4A16-HF",
        "model=phi? version=2? method=eetq?? bits=4?? group=row? activation_bits=16 framework=transformers",
        ["8 bits a weight"],
    ),
    (
        "mistral-7B-v0.1-AWQ-int4.safetensors",
        "model=mistral? version=v0.1 size=7b method=awq bits=4 group=128? symmetric=False? container=safetensors",
        [],
    ),
    (
        "open_llama_3b_v2_q8_0.ggml",
        "model=open_llama? version=v2 size=3b method=ggml type=q8_0 bits=8 group=32 bits_per_weight=8.5 container=ggml",
        ["predecessor of GGUF"],
    ),
    (
        "ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf",
        (
            "publisher=ISTA-DASLab model=Llama? version=2? size=7b method=aqlm bits=2 codebooks=1 codebook_bits=16 "
            "framework=transformers"
        ),
        [],
    ),
    (
        "VPTQ-c/Meta-Llama-3.1-8B-Instruct-v8-k65536-256-woft",
        (
            "publisher=VPTQ-c model=Meta-Llama? version=3.1? size=8b variant=instruct method=vptq bits=3.0 vector=8 "
            "centroids=65536 residual_centroids=256"
        ),
        [],
    ),
    (
        "mobiuslabsgmbh/Llama-2-7b-4bit-gs64-HQQ",
        "publisher=mobiuslabsgmbh model=Llama? version=2? size=7b method=hqq bits=4 group=64",
        [],
    ),
    (
        "m-7b.IQ2_XXS.gguf",
        "model=m? size=7b method=ggml type=iq2_xxs bits=2 bits_per_weight=2.0625 container=gguf",
        [],
    ),
    (
        "t/Mistral-7B-exl2-4.0bpw",
        "publisher=t model=Mistral? size=7b method=exl2 bits=4.0",
        [],
    ),
    (
        "nm/Llama-3-8B-FP8-dynamic",
        "publisher=nm model=Llama? version=3? size=8b grid=fp8 bits=8 activation_bits=8 activations=dynamic",
        [],
    ),
    (
        "r/Qwen2.5-7B-Instruct-quantized.w8a8",
        "publisher=r model=Qwen2.5? size=7b variant=instruct bits=8 activation_bits=8 quantized=True",
        [],
    ),
    (
        "unsloth/llama-3-8b-bnb-4bit",
        "publisher=unsloth model=llama? version=3? size=8b method=bitsandbytes bits=4",
        [],
    ),
    (
        "TheBloke/Llama-2-7B-GPTQ:gptq-4bit-128g-actorder_True",
        "publisher=TheBloke model=Llama? version=2? size=7b method=gptq bits=4 group=128 act_order=True",
        [],
    ),
    ("m/b-GPTQ-4bit--act_order_false", "publisher=m model=b? method=gptq bits=4 group=128? act_order=False", []),
    (
        "Qwen/Qwen3-30B-A3B-GPTQ-Int4",
        "publisher=Qwen model=Qwen3? size=30b-a3b method=gptq bits=4 group=128?",
        [],
    ),
    ("x/b-GPTQ-HQQ-3bit", "publisher=x model=b? method=gptq-hqq bits=3", ["no method has this name"]),
    ("b-3bit-int4", "model=b? bits=3??", ["3bit says bits 3, int4 says 4"]),
    ("b-7b-GPTQ.gguf", "model=b? size=7b method=gptq?? bits=4? group=128? container=gguf??", ["no type in GGUF"]),
    (
        "b.q6_k.safetensors",
        "model=b? method=ggml?? type=q6_k bits=6 bits_per_weight=6.5625 container=safetensors??",
        ["stored in .gguf"],
    ),
    ("meta-llama/Llama-3.1-8B", "publisher=meta-llama model=Llama? version=3.1? size=8b", []),
]


@pytest.mark.parametrize(("text", "wanted", "words"), NAMES, ids=[row[0] for row in NAMES])
def test_what_names_say(text: str, wanted: str, words: list[str]) -> None:
    name = decode(text)
    marks = {"high": "", "medium": "?", "low": "??"}
    found = {f"{key}={said.value}{marks[said.confidence]}" for key, said in name.facts.items()}
    assert found == {*wanted.split()}
    assert len(name.warnings) == len(words)
    assert all(word in text for word, text in zip(words, name.warnings, strict=True))


@pytest.mark.parametrize(
    "text",
    ["", "/", "..", "../..", "\0\0", "-" * 5000, "a" * 5000, "v0-k0-0", "é", "q9_k", "(", "9" * 400, "\x1b[31m",
     "1x1 aqlm", "/".join("ab" * 200)],
)  # fmt: skip
def test_nonsense_is_read_in_peace(text: str) -> None:
    name = decode(text)
    json.dumps(name.to_dict())
    assert len(name.text) <= 300
    assert name.text.isprintable()


def test_every_row_of_the_table_serves_a_name() -> None:
    """Rows that nothing above needs are few; those there are stand here."""
    texts = [*(row[0] for row in NAMES), *UNUSUAL]
    tokens = {said.token.lower() for text in texts for said in decode(text).facts.values()}
    idle = [r["pattern"] for r in names_table()["tokens"] if not any(re.fullmatch(r["pattern"], t) for t in tokens)]
    assert not [pattern for pattern in idle if "(?<=" not in pattern]


UNUSUAL = [
    *("b-q4_0-gguf", "b.tq1_0.gguf", "b-mxfp4_moe.gguf", "b.i1-Q2_K_S.gguf", "b.iq3_m.gguf", "b-gptq", "b-aqlm-pv"),
    *("b-vptq", "b-autoround", "b-qlora", "b-nvfp4", "b-mxfp8", "b-fp8-e5m2", "b-fp4", "b-smoothquant", "b-spinquant"),
    *("b-b1.58", "bitnet-2b", "b-qat", "b-w4", "b-sym", "b-asym", "b-desc-act", "b-bf16", "b-fp32", "b-it", "b-awq"),
    "b-00001-of-00002",
]


@pytest.mark.parametrize(
    ("called", "words"),
    [
        ("m-8bit", "8bit says 8 bits, most quantized weights have 4"),
        ("m-fp16", "fp16 says 16 bits"),
        ("m-4bit-128g", "128g says groups of 128, most quantized weights have blocks g32"),
        ("m-nf4-gguf", None),
        ("m-int4-g32", None),
        ("m-GPTQ", None),  # compressed-tensors holds what any method makes
        ("wholly-different", None),
    ],
)
def test_a_name_and_its_content(tmp_path: Path, called: str, words: str | None) -> None:
    found = inspect(packed_checkpoint(tmp_path / called))
    texts = [finding.fact for finding in found.findings if finding.level == "warning"]
    assert found.sound
    assert len(texts) == (words is not None)
    assert words is None or words in texts[0]


def test_a_float_checkpoint_under_the_name_of_a_quantized_one(tmp_path: Path) -> None:
    save_file({"w": torch.randn(8, 8)}, tmp_path / "m-4bit.safetensors")
    (finding,) = inspect(tmp_path / "m-4bit.safetensors").findings
    assert finding.fact == "the name: 4bit says 4 bits, every weight is stored as a float"


def test_a_layout_of_another_method(tmp_path: Path) -> None:
    from tests.e2e.test_inspect import checkpoint

    checkpoint(tmp_path / "m-GPTQ-4bit", "awq", "int4-g32-asym")
    texts = [finding.fact for finding in inspect(tmp_path / "m-GPTQ-4bit").findings]
    assert texts == ["the name: GPTQ-4bit says gptq, its config says awq"]


def test_a_file_that_is_called_something_else(tmp_path: Path) -> None:
    save_file({"w": torch.randn(8, 8)}, tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"m\.gguf is called \.gguf and holds safetensors; rename"):
        inspect(tmp_path / "m.gguf")
    (tmp_path / "m.safetensors").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match="holds gguf"):
        inspect(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", None), (b"GGUF\x03", "gguf"), (b"PK\x03\x04xx", "pytorch"), (b"\x80\x02}", "pytorch"), (b"lmgg", "ggml"),
        (b"\x1c\0\0\0TFL3\0\0", "tflite"), (b"\x02\0\0\0\0\0\0\0{}", "safetensors"), (b"\xff\0\0\0\0\0\0\0{}", None),
        (b"\x02\0\0\0\0\0\0\0", None), (b"\x89HDF\r\n", "hdf5"), (b"hello, world", None),
    ],
)  # fmt: skip
def test_first_bytes(tmp_path: Path, data: bytes, kind: str | None) -> None:
    (tmp_path / "file").write_bytes(data)
    assert sniff(tmp_path / "file") == kind
