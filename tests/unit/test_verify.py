"""Verification finds what a disk, or a packer, got wrong, and says where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from benchmarks import synthetic
from lowbit.budget import MemoryWatch
from lowbit.errors import VerifyError
from lowbit.formats import Weight
from lowbit.stages import _store
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.verify import verify
from lowbit.stages.write import Output, open_output
from lowbit.tensors import QTensor
from tests.reference.qtensors import slow_dequantize

NAME = "layers.0.proj.weight"


def write_model(path: Path, layers: int = 1) -> Path:
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{i}.proj.weight" for i in range(layers)]
    tensors = {name: torch.randn(64, 128, generator=generator) for name in names} | {"norm.weight": torch.ones(128)}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "made-up"}')
    return path


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), 8 + size


def damage(path: Path, stored: str, element: int) -> None:
    """Change one element of a stored tensor in place."""
    flat = load_file(path)[stored].reshape(-1)
    flat[element] = flat[element] * 2 + 1 if flat.is_floating_point() else flat[element] ^ 1
    header, begin = header_of(path)
    with path.open("r+b") as file:
        file.seek(begin + header[stored]["data_offsets"][0])
        file.write(flat.view(torch.uint8).numpy().tobytes())


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file, padded to its old length."""
    header, begin = header_of(path)
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(begin - 8)
    assert len(text) == begin - 8
    with path.open("r+b") as file:
        file.seek(8)
        file.write(text)


@contextmanager
def opened(
    tmp_path: Path, rules: Rules, workers: int = 2
) -> Iterator[tuple[Callable[[], None], Callable[[], int], Output]]:
    """A run in its two steps: quantize and finish; verify, which gives the number of weights."""
    model = tmp_path / "m" if (tmp_path / "m").exists() else write_model(tmp_path / "m")
    with open_checkpoint(model) as source:
        plan = make_plan(source, rules)
        way = estimate_memory(plan, None, workers)
        with open_output(tmp_path / "out", source, plan) as output:

            def make() -> None:
                quantize(source, plan, output, way, MemoryWatch(None))
                output.finish(source)

            yield make, lambda: verify(source, output, way).tensors, output


@pytest.mark.parametrize(
    ("scheme", "form", "stored", "element", "words"),
    [
        ("int4-g128", "compressed-tensors", "layers.0.proj.weight_packed", 5, "element 40 of its codes"),
        ("int4-g128", "compressed-tensors", "layers.0.proj.weight_scale", 7, "element 7 of its scales"),
        ("int4-g64-asym", "compressed-tensors", "layers.0.proj.weight_zero_point", 0, "element 0 of its zeros"),
        ("nf4-dq", "bitsandbytes", "layers.0.proj.weight.absmax", 3, r"element 3 of its scales\.codes"),
        ("int4-g128", "gptq", "layers.0.proj.qweight", 64, r"element 8 of its codes"),
        ("int4-g128", "compressed-tensors", "norm.weight", 9, "element 9 of its weight: 3.0 is stored, 1.0 was meant"),
    ],
)
@pytest.mark.parametrize("when", ["between", "unmarked", "never"])
def test_a_changed_element_fails_the_run_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, form: str, stored: str, element: int, words: str,
    when: str,
) -> None:  # fmt: skip
    """It changes between writing and reading back, or later in a weight that the journal does not say was compared."""

    def write_badly(output: Output, name: str, data: memoryview, at: int = 0) -> None:
        write(output, name, data, at)
        if name == stored and when == "between":
            damage(tmp_path / "out/.lowbit/model.safetensors.partial", stored, element)

    write = Output.write
    monkeypatch.setattr(Output, "write", write_badly)
    with opened(tmp_path, Rules(scheme, format=form)) as (make, check, output):
        if when == "between":
            with pytest.raises(VerifyError, match=words) as caught:
                make()
            assert (stored if stored == "norm.weight" else NAME) not in output.records
        else:
            make()
            assert check() == 2
        if when == "unmarked":
            output.records = {name: replace(record, verified=False) for name, record in output.records.items()}
            damage(tmp_path / "out/model.safetensors", stored, element)
            with pytest.raises(VerifyError, match=words) as caught:
                check()
        assert when == "never" or (NAME in str(caught.value)) != (stored == "norm.weight")


def test_what_a_packer_got_wrong_is_not_journalled(tmp_path: Path) -> None:
    with opened(tmp_path, Rules("int4-g128")) as (make, _, output):
        rules = output.plan.rules

        def pack(weight: Weight, value: QTensor, into: Mapping[str, torch.Tensor]) -> None:
            rules.pack(weight, value, into)
            into["layers.0.proj.weight_packed"][-1] = 0

        vars(output.plan)["rules"] = replace(rules, pack=pack)
        with pytest.raises(VerifyError, match=rf"{NAME} differs from what was meant in element 80\d\d of its codes"):
            make()
        assert NAME not in output.records


def test_bytes_that_change_after_the_mark_are_found_when_the_run_is_given_again(tmp_path: Path) -> None:
    """No later stage of the same run reads them again; the journal's digests of what was stored still tell."""
    with opened(tmp_path, Rules("int4-g128")) as (make, check, output):
        make()
        whole = (tmp_path / "out/model.safetensors").read_bytes()
        damage(tmp_path / "out/model.safetensors", f"{NAME}_packed", 5)
        assert output.reading > 0 and check() == 2
    with opened(tmp_path, Rules("int4-g128")) as (make, check, output):
        assert output.resumed == 1 and NAME not in output.records
        make()
        assert check() == 2
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole


def swap(header: dict[str, Any]) -> None:
    first, second = (header[f"layers.{i}.proj.weight_packed"] for i in (0, 1))
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def retype(header: dict[str, Any]) -> None:
    header["layers.0.proj.weight_scale"]["dtype"] = "F16"
    header["__metadata__"]["format"] = "p"


@pytest.mark.parametrize("change", [swap, retype])
def test_a_header_that_says_something_else_is_found(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    write_model(tmp_path / "m", layers=2)
    with opened(tmp_path, Rules("int4-g128")) as (make, check, _):
        make()
        rewrite_header(tmp_path / "out/model.safetensors", change)
        with pytest.raises(VerifyError, match="finds other tensors than were written"):
            check()


def test_a_configuration_that_declares_another_scheme_is_found(tmp_path: Path) -> None:
    with opened(tmp_path, Rules("int4-g128", format="gptq")) as (make, check, _):
        make()
        for file in ("config.json", "quantize_config.json"):
            text = (tmp_path / "out" / file).read_text()
            (tmp_path / "out" / file).write_text(text.replace('"sym": true', '"sym": false'))
        with pytest.raises(VerifyError, match=NAME):
            check()


def test_a_tensor_too_many_is_not_overlooked(tmp_path: Path) -> None:
    with opened(tmp_path, Rules("int4-g128"), workers=1) as (make, check, _):
        make()
        tensors = load_file(tmp_path / "out/model.safetensors") | {"stray": torch.ones(1)}
        save_file(tensors, tmp_path / "out/model.safetensors")
        with pytest.raises(VerifyError, match="stray is there and was not meant"):
            check()


ROWS = "model.layers.0.mlp.down_proj.weight"


def write_llama(path: Path) -> None:
    """A model of one block, if it is not there."""
    small = "--layers 1 --hidden 256 --mlp 512 --heads 4 --kv-heads 2 --vocab 512"
    if not path.exists():
        synthetic.write(synthetic.parser().parse_args([str(path), *small.split()]))


@contextmanager
def in_rows(
    tmp_path: Path, out: str, scheme: str, method: str, *, piece: int, scratch: bool = False
) -> Iterator[tuple[Output, Callable[[], None]]]:
    """A run into GGUF whose weights are stored in pieces, or whole where codes lie in scratch files."""
    write_llama(tmp_path / "llama")
    with open_checkpoint(tmp_path / "llama") as source:
        plan = make_plan(source, Rules(scheme, format="gguf", method=method))
        way = replace(estimate_memory(plan, None, 2), piece=piece, scratch=scratch)
        with open_output(tmp_path / out, source, plan) as output:
            yield output, lambda: quantize(source, plan, output, way, MemoryWatch(None))


@pytest.mark.parametrize(
    ("scheme", "method"), [("q4_k", "ggml_fit"), ("q6_k", "ggml"), ("q8_0", "rtn"), ("q4_1", "mse")]
)
def test_rows_stored_apart_are_the_bytes_and_the_journal_of_whole_weights(
    tmp_path: Path, scheme: str, method: str
) -> None:
    """Also where a piece does not end with the weight, and where a method brings codes of its own."""
    found = []
    for out, piece, scratch in (("whole", 1 << 21, True), ("rows", 21 * 512, False), ("one", 1 << 21, False)):
        with in_rows(tmp_path, out, scheme, method, piece=piece, scratch=scratch) as (output, make):
            make()
            told = {
                name: (each.source, each.meant, each.stored, each.verified) for name, each in output.records.items()
            }
            errors = {name: each.facts.get("largest_error") for name, each in output.records.items()}
            found.append(((tmp_path / out / "model.gguf").read_bytes(), told, errors))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("what", ["file", "reader"])
def test_rows_that_are_not_what_was_meant_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A byte of a later piece changes as it is written, or as it is packed."""

    def write_badly(output: Output, name: str, data: memoryview, at: int = 0) -> None:
        bad = bytearray(data)
        if name == ROWS and at > 0:
            bad[20] ^= 1
        write(output, name, memoryview(bad), at)

    write = Output.write
    with in_rows(tmp_path, "out", "q4_k", "ggml", piece=64 * 512) as (output, make):
        rules = output.plan.rules

        def pack(weight: Weight, value: QTensor, into: Mapping[str, torch.Tensor]) -> None:
            rules.pack(weight, value, into)
            if weight.name == ROWS:
                into[ROWS][-1, 20] ^= 1

        if what == "file":
            monkeypatch.setattr(Output, "write", write_badly)
        else:
            vars(output.plan)["rules"] = replace(rules, pack=pack)
        first = 64 * 512 + 4 if what == "file" else 63 * 512 + 4
        with pytest.raises(VerifyError, match=f"{ROWS} differs from what was meant in element {first} of its codes"):
            make()
        assert ROWS not in output.records


@pytest.mark.parametrize(("format", "scheme"), [("gptq", "int4-g128"), ("mlx", "int4-g64-min"), ("gguf", "q4_k")])
def test_codes_that_go_over_into_rows_are_those_of_whole_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, scheme: str
) -> None:
    """In several panels, the last of fewer rows; a byte that the disk changes in a later one is named."""
    write_llama(tmp_path / "llama")
    lowbit.quantize(tmp_path / "llama", tmp_path / "in", scheme=scheme, format=format)
    found = []
    for out, panel in (("one", 2**22), ("many", 3 * 2**14)):
        monkeypatch.setattr(_store, "_PANEL", panel)
        assert lowbit.convert(tmp_path / "in", tmp_path / out, format="gguf").lossless
        lines = map(json.loads, (tmp_path / out / ".lowbit/journal.jsonl").read_text().splitlines()[1:])
        told = sorted((line["tensor"], *line["meant"].items(), *line["stored"].items()) for line in lines)
        found.append(((tmp_path / out / "model.gguf").read_bytes(), told))
    assert found[0] == found[1]
    with open_checkpoint(tmp_path / "in") as before, open_checkpoint(tmp_path / "many") as after:
        names = [name for name, weight in before.weights.items() if weight.scheme]
        assert any(after.weights[name].interleaved for name in names) and ROWS in names
        for one, other in ((before.load(name), after.load(name)) for name in names):
            assert isinstance(one, QTensor) and isinstance(other, QTensor)
            assert torch.equal(slow_dequantize(one), slow_dequantize(other))
    write = Output.write

    def write_badly(output: Output, name: str, data: memoryview, at: int = 0) -> None:
        bad = bytearray(data)
        if name == ROWS and at > 0:
            bad[-1] ^= 1
        write(output, name, memoryview(bad), at)

    monkeypatch.setattr(Output, "write", write_badly)
    with pytest.raises(VerifyError, match=f"{ROWS} differs from what was meant in element .* of its codes"):
        lowbit.convert(tmp_path / "in", tmp_path / "bad", format="gguf")
