"""Checkpoint: names, shapes, dtypes and lazy tensors of a model on disk. Opening reads headers, never weights."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files as package
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowbit import plugins
from lowbit.arguments import public
from lowbit.errors import CheckpointError, FormatError, LowbitError, UnsupportedError, UsageError
from lowbit.formats import Format, Spec, Weight
from lowbit.formats._switch import of_expert
from lowbit.formats.onnx import is_declared as is_onnx
from lowbit.schemes import FLOATS
from lowbit.stages._directory import (
    GGUF,
    ONNX,
    TORCH_SUFFIXES,
    WEIGHT_SUFFIXES,
    Index,
    find_beside,
    find_extras,
    find_shards,
)
from lowbit.stages._gguf_model import open_gguf
from lowbit.stages._onnx_model import open_onnx
from lowbit.stages._safetensors import read_safetensors
from lowbit.stages._torchfile import read_torch
from lowbit.stages._weightfile import Slot, WeightFile, one_line, read_json, show
from lowbit.tensors import QTensor

# What a plug-in may stumble over in a configuration or in tensors that nobody promised to be sane.
_STUMBLES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)

LEFT = "llama.cpp takes them from a file of its own (mmproj)"
_UNSAID = "put the config.json there that was written with them"
_INCOMPLETE = "some of their tensors are missing or misnamed, get the file again"
_MOST = 4096  # experts of a layer; a header may claim more than there is memory for
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
AHEAD = (
    "layers after the model's last, which foresee tokens further on, are not in its class, and llama.cpp does without"
)
# Beside NVFP4 in GGUF, for kernels that round inputs to it.
_INPUTS = ".input_scale"
_IGNORED = "{count} scales of inputs, as {first}, are neither used nor carried: inputs are not rounded here"
# What transformers' causal models call their output layer. Of two equal tensors it is the one that must not be kept:
# loaders tie it to the embedding, never the embedding to it.
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out)\.weight")
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte)\.")


@final
@dataclass(frozen=True)
class View:
    """What of a checkpoint is not as it lies there.

    Attributes:
        left: where it is a part of what lies there, with a configuration of its own, the weights of the rest.
        ahead: weights that it lacks of layers after the model's last.
        was: weights that are read as floats and are stored otherwise (`_dequantized.py`), with their scheme and format.
        made_bytes: bytes of memory that the largest of these takes while it is read.
    """

    left: frozenset[str] | None = None
    ahead: frozenset[str] = frozenset()
    was: Mapping[str, str] = field(default_factory=dict)
    made_bytes: int = 0


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint; a context manager for symmetry, nothing is held open between reads.

    Attributes:
        path: directory or single file.
        config: `config.json`; empty for a single file and where there is none.
        specs: every stored tensor, in file order.
        shards: weight files, sorted.
        extras: files to carry to an output: everything in the directory that is no weight.
        format: plug-in of `formats/` that recognised the checkpoint; None for a float checkpoint.
        weights: logical weights in file order: quantized ones with their scheme, their stored pieces folded in;
            everything else as it is stored.
        files: stored tensor to the file that holds it.
        edits: stored tensor to what is read in its place: a function of it, of the same shape. The result may have more
            digits than `specs` says, which is the dtype in which it is to be stored.
        terms: weight to a low-rank pair `(down, up)`, whose product stands beside it (an adapter).
        trusted: whether Python code that it brings may be run.
        view: how it differs from what lies at `path`.
    """

    path: Path
    config: Mapping[str, Any]
    specs: Mapping[str, Spec]
    shards: tuple[Path, ...]
    extras: tuple[Path, ...]
    format: str | None
    weights: Mapping[str, Weight]
    files: Mapping[str, WeightFile]
    edits: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    terms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    trusted: bool = False
    view: View = View()

    @property
    def root(self) -> Path:
        """The directory in which it lies."""
        return self.path if self.path.is_dir() else self.path.parent

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tensor(self, name: str) -> Tensor:
        """One stored tensor as a view of the mapped file, or what is read in its place (`edits`).

        A view must not be written to: the file would stay as it is, but the pages would become memory.

        Raises:
            CheckpointError: no such tensor, or the file changed since it was opened.
        """
        stored = _read(self.path, self.files, name)
        return self.edits[name](stored) if name in self.edits else stored

    def load(self, name: str, codes: Tensor | None = None) -> Tensor | QTensor:
        """One logical weight: the stored tensor, or what its format unpacks from the stored pieces.

        `codes`, where given, is a buffer for the codes of a quantized weight (`Format.unpack`).

        Raises:
            CheckpointError: no such weight, or the file changed since it was opened.
            FormatError: the stored pieces break the layout of their format.
        """
        return self.unpacked(name, self.stored(name), codes)

    def factors(self, name: str) -> Float[Tensor, "inputs"] | None:
        """What a runtime multiplies the inputs of a weight by, where it does."""
        scheme = self.weights[name].scheme
        found = self.load(name) if scheme and scheme.smooth else None
        return found.factors if isinstance(found, QTensor) else None

    def stored(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of one weight by name, in order; raises like `tensor`."""
        return {piece: self.tensor(piece) for piece in self.pieces(name)}

    def unpacked(self, name: str, pieces: Mapping[str, Tensor], codes: Tensor | None = None) -> Tensor | QTensor:
        """One logical weight from its stored tensors; raises like `load`."""
        weight = self.weights.get(name)
        if weight is None or weight.scheme is None or self.format is None:
            return pieces[name]
        form: Format = plugins.load("formats", self.format)
        try:
            return form.unpack(weight, pieces, codes)
        except (LowbitError, *_STUMBLES) as error:
            _reraise(self.files[next(iter(pieces))].path, self.files, name, self.format, error)

    def pieces(self, name: str) -> list[str]:
        """Names of the stored tensors of one weight."""
        weight = self.weights.get(name)
        if weight is None or weight.scheme is None or self.format is None:
            return [name]
        form: Format = plugins.load("formats", self.format)
        return [piece for piece in form.owns(weight) if piece in self.specs]

    def dequantized(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One weight as the model holds it, in `dtype` or the dtype it had before it was quantized; raises like `load`.

        Its low-rank term is in it, unless the runtime rounds the weight's inputs: the term reads them as they are.
        """
        loaded, dtype = self.load(name), dtype or self.weights[name].dtype
        if name in self.terms and self.weights[name].activations is None:
            down, up = self.terms[name]
            whole = loaded.dequantize() if isinstance(loaded, QTensor) else loaded.float()
            found = torch.addmm(whole, up, down).to(dtype)
        else:
            found = loaded.dequantize(dtype) if isinstance(loaded, QTensor) else loaded.to(dtype)
        return found.transpose(-2, -1).contiguous() if self.weights[name].swapped else found

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors; those that share storage count once."""
        shared = {alias for file in set(self.files.values()) for alias in file.tied}
        return sum(s.nbytes for name, s in self.specs.items() if name not in shared)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Entries of the files that are no tensors of the model and are not carried, sorted."""
        return tuple(sorted({name for file in set(self.files.values()) for name in file.skipped}))

    @property
    def notes(self) -> list[str]:
        """What of the files is not carried, a sentence for each entry, and one for all scales of inputs."""
        inputs = [name for name in self.skipped if name.endswith(_INPUTS)]
        found = [f"{name} is no tensor of the model and is not carried" for name in self.skipped if name not in inputs]
        found += [_IGNORED.format(count=len(inputs), first=name) for name in inputs[:1]]
        return found + ([self.left_out] if self.left_out else [])

    @cached_property
    def unexplained(self) -> str | None:
        """What is said of matrices that look like codes, where nothing says how to read them; None where none do.

        They are integers of at most 32 bits, or 8-bit floats with a scale beside them; bytes may have more axes (ONNX's
        blocks, experts). What belongs to a weight that a format recognised is none, nor is a table that has a weight
        beside it (hashes of tokens in a router), a mask (GPT-NeoX's `attention.bias`), nor an index of 64 bits.
        """
        if self.shards[0].suffix in (GGUF, ONNX):  # these say of each tensor what it is
            return None
        quantized = {name: weight.module for name, weight in self.weights.items() if weight.scheme}
        owned = {piece for name in quantized for piece in self.pieces(name)}
        owners = {name: name.rpartition(".")[0] for name in self.specs}
        read = {owners[n] for n, s in self.specs.items() if n.endswith(".weight") and s.dtype in FLOATS.values()}
        read |= set(quantized.values())
        scaled = {owner for name, owner in owners.items() if "scale" in name.removeprefix(owner)}
        found = [
            name
            for name, owner in owners.items()
            if not (name in owned or owner in read or name.endswith("bias"))
            and _holds_codes(self.specs[name], owner in scaled)
        ]
        if not found:
            return None
        wanted = "name the directory instead of the file" if self.path.is_file() else _UNSAID
        wanted = _INCOMPLETE if self.format else wanted
        return f"{len(found)} matrices of codes, as {show(found[0])}, but nothing says how to read them; {wanted}"

    @property
    def left_out(self) -> str | None:
        """What is said of the weights in `left` and `ahead`; None where there are none."""
        said = [f"{len(self.view.left)} weights of what sees or hears are left out: {LEFT}"] if self.view.left else []
        said += [f"{len(self.view.ahead)} weights are left out: {AHEAD}"] if self.view.ahead else []
        return "; ".join(said) or None

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Alias to the tensor that it is one with.

        PyTorch files: names that share storage, tied to the first of them. Safetensors cannot share, so where
        `config.json` says `tie_word_embeddings`: an output layer that equals the embedding (a matrix of `vocab_size`
        rows that is called one, or else the first), byte for byte (compared on first use); or `lm_head.weight`, where
        no output layer is stored.
        """
        tied = {alias: name for file in set(self.files.values()) for alias, name in file.tied.items()}
        text = self.config.get("text_config")
        facts = (text if isinstance(text, dict) else {}) | dict(self.config)
        if tied or facts.get("tie_word_embeddings") is not True:
            return tied
        tables = [name for name, spec in self.specs.items() if spec.shape[:-1] == (facts.get("vocab_size"),)]
        heads = [name for name in self.weights if _HEAD.fullmatch(name)]
        others = [name for name in tables if name not in heads]
        embedding = next((name for name in others if _EMBEDDING.search(name)), next(iter(others), None))
        if embedding and not heads:
            return {"lm_head.weight": embedding}
        return {name: embedding for name in heads if embedding and self._equal(embedding, name)}

    def _equal(self, one: str, other: str) -> bool:
        same = self.specs[one] == self.specs.get(other)
        return same and torch.equal(self.tensor(one).view(torch.uint8), self.tensor(other).view(torch.uint8))


@public
def open_checkpoint(source: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """Open a local directory, a single weight file, or a model of the hub by its name (downloaded to the hub's cache).

    Time and memory depend on the number of tensors, not on their size. `trust_remote_code`: Python code that the
    checkpoint brings may be run, where its model or tokenizer need it.

    Raises:
        UsageError: no such file, directory or model, or a kind of file that is not read.
        CheckpointError: a file is damaged, missing, or lies about itself.
        FormatError: the checkpoint breaks the layout of the format it claims.
        UnsupportedError: it is quantized in a way that no plug-in knows.
    """
    path = _locate(source)
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        (shards, index), extras = _find_shards(path, config), find_extras(path)
    else:
        shards, index, extras, config = [path], None, (), {}
        if path.suffix == GGUF:
            extras, beside = find_beside(path), path.parent / "config.json"
            config = read_json(beside) if beside.exists() else {}
    if shards[0].suffix == GGUF:
        return _open_gguf(path, shards[0], extras, config)
    if shards[0].suffix == ONNX:
        return replace(_open_onnx(path, shards[0], extras, config), trusted=trust_remote_code)
    stored = [_read_file(shard) for shard in shards]
    if index:
        _check_index(index, _merge(stored))
    if isinstance(config.get("quantization"), Mapping) and _turned_by_mlx(config):
        stored = [_as_torch(file) for file in stored]
    files = _merge([_unstacked(file, str(config.get("model_type"))) for file in stored])
    if not files:
        raise CheckpointError(f"{path} holds no tensors")
    specs = {name: file.slots[name].spec for name, file in files.items()}
    name, weights = _recognise(path, config, specs, files)
    return Checkpoint(path, config, specs, tuple(shards), extras, name, weights, files, trusted=trust_remote_code)


def _open_gguf(path: Path, file: Path, extras: tuple[Path, ...], config: Mapping[str, Any]) -> Checkpoint:
    """A GGUF file under the names of transformers; its own header is the configuration where there is no other."""
    model = open_gguf(file)
    config = config or model.config
    if not model.weights:
        raise CheckpointError(f"{path} holds no tensors")
    files = {name: part for part in model.files for name in part.slots}
    specs = {name: part.slots[name].spec for name, part in files.items()}
    weights = {name: replace(w, swapped=True) if swapped(config, w) else w for name, w in model.weights.items()}
    form = "gguf" if any(weight.scheme for weight in weights.values()) else None
    shards = tuple(part.path for part in model.files)
    return Checkpoint(path, config, specs, shards, extras, form, weights, files, model.edits)


def _find_shards(root: Path, config: Mapping[str, Any]) -> tuple[list[Path], Index | None]:
    """The weight files of a directory; a graph comes before files of its data, unless a config.json is of another."""
    graph = root / "model.onnx"
    alone = not (root / "config.json").exists() and list(root.glob(f"*{ONNX}")) == [graph]
    return ([graph], None) if alone or (is_onnx(config) and graph.exists()) else find_shards(root)


def _open_onnx(path: Path, file: Path, extras: tuple[Path, ...], config: Mapping[str, Any]) -> Checkpoint:
    """An ONNX model, whose files are the graph and those that it refers to."""
    try:
        model = open_onnx(file)
    except _STUMBLES as error:
        raise CheckpointError(f"{file} is no ONNX model that is read: {one_line(error)}") from error
    specs = {name: found.slots[name].spec for name, found in model.files.items()}
    weights = {n: replace(w, swapped=True) if w.scheme and swapped(config, w) else w for n, w in model.weights.items()}
    form = "onnx" if any(weight.scheme for weight in weights.values()) else None
    data = sorted({found.path for found in model.files.values()} - {file})
    return Checkpoint(path, config, specs, (file, *data), extras, form, weights, model.files, model.edits)


def swapped(config: Mapping[str, Any], weight: Weight) -> bool:
    """Whether the class of the model that `config.json` names holds this weight as `[inputs, outputs]`."""
    return len(weight.shape) == 2 and arch_row("swapped", config, weight) is not None


def _of_class(config: Mapping[str, Any], weight: Weight) -> Weight:
    """The weight with what the class of the model makes of it."""
    turned = weight.scheme is not None and swapped(config, weight)
    row = arch_row("scaled", config, weight)
    factors = f"{weight.module.rpartition('.')[0]}.{row['act']}.scales" if row else ""
    return replace(weight, swapped=turned, scaled=factors) if turned or factors else weight


def arch_row(table: str, config: Mapping[str, Any], weight: Weight) -> dict[str, Any] | None:
    """The first row of `arch/TABLE.toml` that is for a model and a weight; without `model_types` it is for any."""
    kind = str(config.get("model_type", ""))
    rows = (row for row in arch_rows(table) if kind in row.get("model_types", [kind]))
    return next((row for row in rows if re.search(row["pattern"], weight.name)), None)


def is_ahead(config: Mapping[str, Any], name: str) -> bool:
    """Whether a weight is of layers that foresee tokens: beside the others, in Qwen and Nemotron-H, or after the last.

    Those after it are as many as `num_nextn_predict_layers` tells.
    """
    if name.startswith("mtp."):
        return True
    layer = _LAYER.match(name)
    last, more = (config.get(key) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    return layer is not None and type(last) is type(more) is int and 0 <= int(layer[1]) - last < more


@cache
def arch_rows(table: str, part: str = "") -> list[dict[str, Any]]:
    """The rows of `arch/TABLE.toml`, in order; of its part `part`, where it has several."""
    text = package("lowbit").joinpath(f"arch/{table}.toml").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = tomllib.loads(text)[part or table]
    return rows


def _read(path: Path, files: Mapping[str, WeightFile], name: str) -> Tensor:
    if name not in files:
        raise CheckpointError(f"{path} holds no tensor {show(name)}")
    return files[name].tensor(name)


def _read_file(path: Path) -> WeightFile:
    return read_torch(path) if path.name.endswith(TORCH_SUFFIXES) else read_safetensors(path)


def _turned_by_mlx(config: Mapping[str, Any]) -> bool:
    return any(config.get("model_type") in row["model_types"] for row in arch_rows("mlx", "turned"))


def _as_torch(file: WeightFile) -> WeightFile:
    """A file of MLX with depthwise convolutions `[channels, taps, 1]` in PyTorch's order: of the same bytes."""
    slots = {
        name: replace(slot, spec=Spec(slot.spec.dtype, (slot.spec.shape[0], 1, slot.spec.shape[1])))
        if name.endswith("conv1d.weight") and len(slot.spec.shape) == 3 and slot.spec.shape[2] == 1 and not slot.stride
        else slot
        for name, slot in file.slots.items()
    }
    return replace(file, slots=slots)


def read_unstacked(path: Path, model_type: str) -> WeightFile:
    """A safetensors file in which every expert of a tensor that has those of a layer is a tensor; raises as it."""
    return _unstacked(read_safetensors(path), model_type)


def _unstacked(file: WeightFile, model_type: str) -> WeightFile:
    slots: dict[str, Slot] = {}
    for name, slot in file.slots.items():
        names = of_expert(name, model_type)
        found = {name: slot} if names is None else _experts(file, name, *names)
        if not slots.keys().isdisjoint(found):
            raise CheckpointError(
                f"{file.path}: tensor {show(name)} has what {show(next(iter(found)))} is there for, too"
            )
        slots |= found
    return replace(file, slots=slots)


def _experts(file: WeightFile, name: str, before: str, behind: str) -> dict[str, Slot]:
    """What a tensor `[experts, ...]` has of each, by a name that has its number between two parts."""
    slot = file.slots[name]
    count, *shape = slot.spec.shape or (0,)
    if not shape or slot.stride or not 0 < count <= _MOST:
        raise CheckpointError(
            f"{file.path}: tensor {show(name)} is {list(slot.spec.shape)}, which is not of the experts of a layer"
        )
    extent = slot.extent // count
    size = extent * slot.spec.dtype.itemsize
    spec = Spec(slot.spec.dtype, tuple(shape))
    return {f"{before}{e}{behind}": Slot(spec, slot.start + e * size, extent) for e in range(count)}


def _merge(files: list[WeightFile]) -> dict[str, WeightFile]:
    """Tensor name to file, over all shards."""
    found: dict[str, WeightFile] = {}
    for file in files:
        for name in file.slots:
            if found.setdefault(name, file) is not file:
                raise CheckpointError(f"tensor {show(name)} is in {found[name].path} and again in {file.path}")
    return found


def _check_index(index: Index, files: Mapping[str, WeightFile]) -> None:
    """Index and shards must list the same tensors in the same files."""
    names = {file: file.path.name for file in set(files.values())}
    for name, wanted in index.table.items():
        if name not in files or names[files[name]] != wanted:
            raise CheckpointError(f"{index.path}: tensor {show(name)} should be in {wanted}, which does not have it")
    for name in files:
        if name not in index.table:
            raise CheckpointError(f"{files[name].path}: tensor {show(name)} is not in the index {index.path.name}")


def _locate(source: str | Path) -> Path:
    """The file or directory that is meant; what is not here and looks like a model's name is fetched from the hub."""
    path = Path(source).expanduser()
    known = (".safetensors", *TORCH_SUFFIXES, GGUF, ONNX)
    if path.is_dir() or (path.exists() and path.name.endswith(known)):
        return path
    if path.exists():
        raise UsageError(f"{path} is no directory and no file of weights ({', '.join(known)})")
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)) and not path.name.endswith(WEIGHT_SUFFIXES):
        return _download(str(source))
    raise UsageError(f"there is no file or directory {show(str(source))}")


def _download(name: str) -> Path:
    """The local copy of a model of the hub: its safetensors, its PyTorch files only where it has no safetensors."""
    from huggingface_hub import snapshot_download

    others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix not in (".safetensors", ".bin")]
    try:
        path = Path(snapshot_download(name, ignore_patterns=[*others, "*.bin"]))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, ignore_patterns=others))
    except Exception as error:  # noqa: BLE001 - network, cache, rights, names: the hub's errors share no base
        raise UsageError(
            f"there is no file or directory {show(name)}, and the hub gave no model of that name: {one_line(error)}"
        ) from None
    return path


def _recognise(
    path: Path, config: Mapping[str, Any], specs: Mapping[str, Spec], files: Mapping[str, WeightFile]
) -> tuple[str | None, dict[str, Weight]]:
    """Name of the format that takes the checkpoint for its own, and the logical weights."""
    declared = _declared(path, config)
    if declared is None and not any(_looks_packed(spec) for spec in specs.values()):
        return None, _logical(path, config, specs, {}, {})
    for name in plugins.names("formats"):
        form: Format = plugins.load("formats", name)
        try:
            taken = form.recognise(config, specs, lambda tensor: _read(path, files, tensor))
            if taken is not None:
                found = {each: _of_class(config, weight) for each, weight in taken.items()}
                return name, _logical(path, config, specs, found, {each: form.owns(found[each]) for each in found})
        except (LowbitError, *_STUMBLES) as error:
            _reraise(path, files, "config.json", name, error)
    if declared is not None:
        method, known = show(declared.get("quant_method")), ", ".join(plugins.names("formats"))
        raise UnsupportedError(f"{path} is quantized by {method}, which none of the formats here reads ({known})")
    return None, _logical(path, config, specs, {}, {})


def _declared(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `config.json` says of its quantization, at its top or in the part for the text model."""
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        declared = table.get("quantization_config")
        if declared is not None and not isinstance(declared, dict):
            raise CheckpointError(f"{path / 'config.json'}: quantization_config is {show(declared)}, not a table")
        if declared is not None:
            return declared
    return None


def _holds_codes(spec: Spec, scaled: bool) -> bool:
    """Whether a tensor looks like codes: bytes of two axes or more, 8-bit floats with scales, a matrix of words."""
    if len(spec.shape) < 2 or spec.dtype is torch.bool:
        return False
    if spec.dtype.itemsize == 1:
        return scaled or not spec.dtype.is_floating_point
    return not spec.dtype.is_floating_point and len(spec.shape) == 2 and spec.dtype.itemsize <= 4


def require_explained(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of which codes would be taken for what the model computes with.

    Raises:
        UnsupportedError: with the first of them.
    """
    if checkpoint.unexplained:
        raise UnsupportedError(f"{checkpoint.path} holds {checkpoint.unexplained}")


def _looks_packed(spec: Spec) -> bool:
    """A matrix of integers or of 8-bit floats, as formats pack codes into."""
    return len(spec.shape) >= 2 and (spec.dtype.itemsize == 1 or not spec.dtype.is_floating_point)


def _logical(
    path: Path,
    config: Mapping[str, Any],
    specs: Mapping[str, Spec],
    quantized: Mapping[str, Weight],
    pieces: Mapping[str, Any],
) -> dict[str, Weight]:
    """Logical weights in file order: a quantized one stands where the first of its pieces is stored."""
    owner = {piece: name for name in quantized for piece in pieces[name]}
    weights: dict[str, Weight] = {}
    for name, spec in specs.items():
        kept = name not in owner
        weight = _of_class(config, Weight(name, spec.shape, spec.dtype)) if kept else quantized[owner[name]]
        weights.setdefault(weight.name, weight)
    for name in quantized:
        if name not in weights:
            raise FormatError(f"{path}: tensor {show(name)} has no stored part")
    return weights


def _reraise(path: Path, files: Mapping[str, WeightFile], what: str, form: str, error: Exception) -> NoReturn:
    """Say in which file a format found an error: in that of the stored tensor that the error names, or at `path`.

    A plug-in that stumbled, without an error of its own, has met something that its layout does not allow.
    """
    text = str(error)
    if not isinstance(error, LowbitError):
        text = f"{what} does not follow the layout {form} ({type(error).__name__}: {one_line(error)})"
    named = max((name for name in files if name in text), key=len, default=None)
    where = files[named].path if named else path
    kind = type(error) if isinstance(error, LowbitError) else FormatError
    raise kind(text if str(where) in text else f"{where}: {text}") from error
