"""What is this checkpoint, how was it made, and is it sound?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lowbit import plugins
from lowbit.errors import CheckpointError, FormatError, LowbitError, UsageError
from lowbit.formats import Format, Weight
from lowbit.inspect import agree
from lowbit.inspect.compare import compare
from lowbit.inspect.container import sniff
from lowbit.inspect.facts import Finding, Inspection, TensorFacts
from lowbit.inspect.grids import recognise
from lowbit.inspect.names import Name, decode
from lowbit.inspect.provenance import convention, declared, made_by
from lowbit.inspect.sanity import check_plain, check_quantized
from lowbit.stages._adapter import adapter_beside
from lowbit.stages._experts import apart
from lowbit.stages._gguf_limits import contradiction
from lowbit.stages._history import methods
from lowbit.stages._row_views import apart_in_rows
from lowbit.stages._rows import Runs, blocks_of
from lowbit.stages.checkpoint import Checkpoint, arch_row, open_checkpoint
from lowbit.stages.quantize import one_torch_thread
from lowbit.tensors import QTensor, scheme_bytes

__all__ = ["Finding", "Inspection", "TensorFacts", "inspect"]

Progress = Callable[[str, int, int], None]


def inspect(
    source: str | Path,
    progress: Progress = lambda stage, done, total: None,
    original: str | Path | None = None,
) -> Inspection:
    """Tell what a checkpoint is and whether it is sound; weights are read one at a time.

    Args:
        source: directory, weight file or hub name.
        progress: called with `(stage, bytes done, bytes in all)`.
        original: the same of the float checkpoint that it was made from, to compare weights with; one quantized weight
            is then held in float32 twice.

    Raises:
        LowbitError: it cannot be opened; what is wrong with single weights is a finding, not an error.
    """
    with _open(source) as checkpoint:
        made, done, total = methods(checkpoint), 0, checkpoint.nbytes
        tensors: list[TensorFacts] = []
        findings = _whole(checkpoint)
        for weight in checkpoint.weights.values():
            facts, found = _examine(checkpoint, weight, made.get(weight.name))
            tensors.append(facts)
            findings += found
            done += facts.stored
            progress("inspect", min(done, total), total)
        name, quantized = _name(source), checkpoint.weights.values()
        findings += agree.warnings(name, checkpoint.format, declared(checkpoint), tensors)
        result = Inspection(
            path=str(checkpoint.path),
            container={".safetensors": "safetensors", ".gguf": "gguf", ".onnx": "onnx"}.get(
                checkpoint.shards[0].suffix, "pytorch"
            ),
            files={shard.name: shard.stat().st_size for shard in checkpoint.shards},
            model={key: checkpoint.config[key] for key in ("model_type", "architectures") if key in checkpoint.config},
            format=checkpoint.format,
            declared=declared(checkpoint),
            made_by=made_by(checkpoint),
            tied=dict(checkpoint.tied),
            tensors=tensors,
            findings=findings,
            name=name,
            zero_points=[*dict.fromkeys(convention(checkpoint.format, w.scheme) for w in quantized if w.scheme)],
        )
        return _beside(result, checkpoint, original, progress) if original is not None else result


def _beside(found: Inspection, checkpoint: Checkpoint, original: str | Path, progress: Progress) -> Inspection:
    """The inspection with every weight compared with its original."""
    with open_checkpoint(original) as opened:
        source = apart(opened, checkpoint.format, checkpoint.weights.__contains__)
        source = apart_in_rows(source, _blocks(checkpoint, source))
        alike = [name for name in checkpoint.weights if _shape(checkpoint, name) == _shape(source, name)]
        left = [name for name in checkpoint.weights if name not in set(alike)]
        broken = {finding.tensor for finding in found.findings if finding.level == "error"}
        alike = [name for name in alike if name not in broken]
        if not alike:
            raise UsageError(f"{source.path} has no weight of the names and shapes of {checkpoint.path}")
        plain = [name for name in alike if checkpoint.weights[name].scheme is None]
        pairs = {name: (source.dequantized(name), checkpoint.dequantized(name)) for name in plain}
        vectors = {name: pair for name, pair in pairs.items() if pair[0].ndim == 1}
        changed = sum(not torch.equal(before.float(), now.float()) for before, now in pairs.values())
        compared = []
        for at, name in enumerate(name for name in alike if name not in pairs):
            weight, loaded = checkpoint.weights[name], checkpoint.load(name)
            assert isinstance(loaded, QTensor)
            before = source.dequantized(name, torch.float32)
            before = before.T.contiguous() if weight.swapped else before
            slack = max(_rounding(weight.dtype), _rounding(source.weights[name].dtype))
            compared.append(compare(name, loaded, before, weight.activations is not None, vectors, slack))
            progress("compare", at + 1, len(alike) - len(plain))
        text = f"{len(left)} weights, as {left[0]}, are not in the original under this name and shape" if left else ""
        findings = [*found.findings, *([Finding("note", None, text)] if left else [])]
        return replace(
            found, original=str(source.path), compared=compared, changed=(changed, len(plain)), findings=findings
        )


def _rounding(dtype: torch.dtype) -> float:
    """By how much of itself a value is rounded, once as a factor and once as what was multiplied by one."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _blocks(checkpoint: Checkpoint, original: Checkpoint) -> dict[str, list[Runs]]:
    """The blocks of rows of weights that the original has whole."""
    found = {name: [block.rows for block in blocks] for name, blocks in blocks_of(checkpoint.weights).items()}
    rows = {name: sum(last - first for runs in blocks for first, last in runs) for name, blocks in found.items()}
    shapes = {name: weight.shape for name, weight in original.weights.items()}
    return {name: blocks for name, blocks in found.items() if shapes.get(name, ())[:1] == (rows[name],)}


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    """Shape of a weight as the model holds it."""
    weight = checkpoint.weights.get(name)
    return None if weight is None else weight.held


def _name(source: str | Path) -> Name:
    """What the name says: the last part of a path that exists, or a model's name in the hub."""
    path = Path(source).expanduser()
    return decode(path.resolve().name if path.exists() else str(source))


def _open(source: str | Path) -> Checkpoint:
    """The checkpoint; where that fails and a single file is not what its ending says, the error says so."""
    try:
        return open_checkpoint(source)
    except LowbitError as error:
        path = Path(source).expanduser()
        said = decode(path.name).value("container")
        if not path.is_file() or said is None or sniff(path) in (None, said):
            raise
        text = f"{path} is called {path.suffix} and holds {sniff(path)}; rename it to what it is"
        raise type(error)(text) from error


def _whole(checkpoint: Checkpoint) -> list[Finding]:
    """What is wrong with the checkpoint as a whole, and notes on it."""
    found = [Finding("note", None, note) for note in checkpoint.notes]
    terms = adapter_beside(checkpoint.path)
    if terms:
        text = f"low-rank terms lie in {terms}, a PEFT adapter; lowbit evaluate takes it with --adapter {terms}"
        found.append(Finding("note", None, text))
    wrong = contradiction(checkpoint)
    if wrong:
        found.append(Finding("error", *wrong))
    if checkpoint.unexplained:
        found.append(Finding("error", None, f"it holds {checkpoint.unexplained}"))
    return found


def _examine(checkpoint: Checkpoint, weight: Weight, method: str | None) -> tuple[TensorFacts, list[Finding]]:
    """Load one weight, describe it and check it."""
    stored, codes, grid = _stored(checkpoint, weight), None, None
    nbytes = scheme_bytes(weight.scheme, weight.shape) if weight.scheme else stored
    try:
        loaded = checkpoint.load(weight.name)
        if isinstance(loaded, QTensor):
            nbytes = loaded.nbytes
            codes, found = check_quantized(weight.name, loaded, weight.dtype)
        else:
            found = check_plain(weight.name, loaded)
            with one_torch_thread():  # many small operations: on a busy machine threads would wait for one another
                grid = None if found else recognise(loaded)
    except (CheckpointError, FormatError) as error:
        found = [Finding("error", weight.name, str(error))]
    scheme, dtype = str(weight.scheme) if weight.scheme else None, str(weight.dtype).removeprefix("torch.")
    kind = _kind(weight, checkpoint.config)
    return TensorFacts(weight.name, weight.shape, dtype, scheme, method, kind, nbytes, stored, codes, grid), found


def _stored(checkpoint: Checkpoint, weight: Weight) -> int:
    """Bytes of every tensor in the file that belongs to a weight."""
    names = {weight.name}
    if weight.scheme and checkpoint.format:
        form: Format = plugins.load("formats", checkpoint.format)
        names = {name for name in form.owns(weight) if name in checkpoint.specs}
    slots = [checkpoint.files[name].slots[name] for name in names]
    return sum(slot.extent * slot.spec.dtype.itemsize for slot in slots)


def _kind(weight: Weight, config: Mapping[str, object]) -> str:
    """`quantized`, or what a weight that stayed is: the first words of the plan's reason to keep such, or its rank."""
    if weight.scheme:
        return "quantized"
    row = arch_row("keep", config, weight)
    if row:
        return re.split(r"[:,(]| of ", row["reason"])[0].strip()
    return {0: "scalar", 1: "vector", 2: "matrix"}.get(len(weight.shape), f"{len(weight.shape)}-D")
