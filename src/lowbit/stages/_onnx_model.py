"""An ONNX model as a checkpoint: its initializers are the weights, its operators say how these are stored.

The graph is parsed by the `onnx` package, which reads no external data; where these are is checked here. What is within
the graph's own file (2 GB at most, by protobuf) is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count, pairwise, takewhile
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, final

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, FormatError, UsageError
from lowbit.formats import Spec, Weight
from lowbit.formats import onnx as layouts
from lowbit.formats._linear import SCALE_TYPES
from lowbit.schemes import Scheme, parse
from lowbit.stages._directory import is_inside
from lowbit.stages._rows import Runs, block_name, places_name, runs_of, whole_of
from lowbit.stages._weightfile import Slot, WeightFile, one_line, open_regular, show

_LARGEST = 2**31 - 1  # what protobuf can hold
_EXTERNAL = 1
# Numbers of TensorProto.DataType; those of 4 bits are bytes of two.
_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16, 21: torch.uint8, 22: torch.uint8,
}  # fmt: skip
_HALVES = (21, 22)  # UINT4 and INT4: two values a byte, the first in the low half
_SIGNED = (3, 22)
# Names that exporters give to what they computed from a weight: the module is told by the node.
_ANONYMOUS = re.compile(r"val_\d+|onnx::\w+|t_?\d*|\w*[Cc]onstant\w*|_?to_copy(_\d+)?")
_SUFFIX = re.compile(r"(_Q\d+|_quantized|_DQ_Q\d+|\.qweight|_q4)$")
_SCOPES = "pkg.torch.onnx.name_scopes"
_CASTS = ("Cast", "Identity", "Reshape")


@final
@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A graph's weights.

    Attributes:
        files: name of each stored tensor to the file that has it.
        weights: the tensors as weights; those of `MatMulNBits` and with a `DequantizeLinear` have a scheme.
        edits: stored tensor to what is read in its place.
    """

    files: Mapping[str, WeightFile]
    weights: Mapping[str, Weight]
    edits: Mapping[str, Callable[[Tensor], Tensor]]


def open_onnx(path: Path) -> OnnxModel:
    """Check an ONNX file and find its weights.

    Raises:
        UsageError: the package `onnx` is not there.
        CheckpointError: the file is damaged, or its external data are not where it says, or not in its directory.
        FormatError: an operator with a weight in a way that is not read, or which its tensors do not follow.
    """
    graph = _Graph(path, _parse(path).graph)
    found = _Found(path)
    for node in graph.nodes:
        if node.op_type == "MatMulNBits":
            _of_matmul_nbits(graph, node, found)
        elif node.op_type == "DequantizeLinear":
            _of_dequantize(graph, node, found)
        elif node.op_type == "MatMulInteger":
            _of_matmul_integer(graph, node, found)
        elif node.op_type == "GatherBlockQuantized":
            _of_lookup(graph, node, found)
    for name in [name for name in graph.stored if name not in found.taken]:
        _of_float(graph, name, found)
    return found.model()


def _parse(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError(f"to read {path} needs the package onnx: pip install lowbit[onnx]") from None

    with open_regular(path) as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise CheckpointError(f"{path} is larger than 2 GiB, which no ONNX file can be")
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no ONNX model: {one_line(error)}") from None
    if not model.graph.node or not model.graph.initializer:
        raise CheckpointError(f"{path} holds no graph with weights")
    return model


@final
@dataclass(frozen=True)
class _Stored:
    """An initializer: its file and first byte there, or what is in memory; dtype of ONNX, torch's, and shape.

    Of 4 bits `spec` is of their bytes; `dims` is the shape of the values.
    """

    name: str
    kind: int
    spec: Spec
    dims: tuple[int, ...]
    file: Path
    start: int = 0
    value: Tensor | None = None


@final
class _Graph:
    """The nodes of a graph, and what is stored in it and beside it."""

    def __init__(self, path: Path, graph: Any) -> None:
        self.path, self.nodes = path, list(graph.node)
        self.makers: dict[str, Any] = {name: node for node in self.nodes for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.stored: dict[str, _Stored] = {}
        for tensor in graph.initializer:
            if tensor.name in self.stored or not tensor.name.isprintable() or not tensor.name:
                raise CheckpointError(f"{path}: initializer {show(tensor.name)} occurs twice, or has no usable name")
            if tensor.data_type in _DTYPES:
                self.stored[tensor.name] = _stored(path, tensor)

    def source(self, name: str) -> _Stored | None:
        """The initializer that a value is, through casts."""
        return self.stored.get(self._before(name, _CASTS))

    def looked_up(self, name: str) -> _Stored | None:
        """The initializer of which a value is rows that were looked up."""
        maker = self.makers.get(self._before(name, (*_CASTS, "Unsqueeze")))
        if maker is None or maker.op_type != "Gather" or not maker.input or _attributes(maker).get("axis", 0):
            return None
        return self.source(maker.input[0])

    def _before(self, name: str, kinds: tuple[str, ...]) -> str:
        """The value that one was before operators of these kinds."""
        for _ in range(4):
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in kinds or not maker.input:
                break
            name = maker.input[0]
        return name

    def columns(self, node: Any, filled: int, size: int) -> int:
        """Columns of the weight of a lookup, which a `Slice` cuts where the last group, of `size`, is filled up."""
        for user in self.users.get(node.output[0], ()):
            if user.op_type == "Slice" and len(user.input) > 3 and self._number(user.input[3]) == -1:
                end = self._number(user.input[2])
                if end is not None and filled - size < end < filled:
                    return end
        return filled

    def _number(self, name: str) -> int | None:
        """A constant of the graph that is one number."""
        from onnx import numpy_helper

        maker, stored = self.makers.get(name), self.stored.get(name)
        if stored is not None and stored.value is not None and stored.value.numel() == 1:
            return int(stored.value)
        if maker is None or maker.op_type != "Constant":
            return None
        values = [each.t for each in maker.attribute if each.name == "value"]
        array = numpy_helper.to_array(values[0]) if values else None
        return int(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def wanted(self, node: Any, index: int, what: str) -> _Stored:
        """The initializer that an input of a node is.

        Raises:
            FormatError: it is none.
        """
        name = node.input[index] if index < len(node.input) else ""
        found = self.source(name)
        if found is None:
            raise FormatError(
                f"{self.path}: {_named(node)}: its {what}, {show(name)}, are no initializer of a type that is read"
            )
        return found


def _named(node: Any) -> str:
    return f"{node.op_type} {show(node.name or (node.output[0] if node.output else ''))}"


def _stored(path: Path, tensor: Any) -> _Stored:
    """One initializer, its shape and place checked."""
    where, shape = f"{path}: tensor {show(tensor.name)}", tuple(tensor.dims)
    if any(side < 0 for side in shape) or len(shape) > 8 or prod(max(side, 1) for side in shape) >= 2**60:
        raise CheckpointError(f"{where} has the shape {show(list(shape))}, which no tensor has")
    spec = Spec(_DTYPES[tensor.data_type], (-(-prod(shape) // 2),) if tensor.data_type in _HALVES else shape)
    if tensor.data_location == _EXTERNAL:
        file, start = _external(path, where, tensor, spec.nbytes)
        return _Stored(tensor.name, tensor.data_type, spec, shape, file, start)
    return _Stored(tensor.name, tensor.data_type, spec, shape, path, value=_inside(where, tensor, spec))


def _inside(where: str, tensor: Any, spec: Spec) -> Tensor:
    """An initializer whose values are in the graph."""
    from onnx import numpy_helper

    size = spec.nbytes
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise CheckpointError(
                f"{where} has {len(tensor.raw_data):,} bytes, {spec.dtype} {list(spec.shape)} takes {size:,}"
            )
        raw = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8) if size else torch.empty(0)
        return raw.view(spec.dtype).reshape(spec.shape) if size else torch.empty(spec.shape, dtype=spec.dtype)
    if tensor.data_type in _HALVES:
        raise CheckpointError(f"{where} has 4-bit values that are not raw data, which are not read")
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where} cannot be read: {one_line(error)}") from None
    return (
        torch.frombuffer(bytearray(array.tobytes()), dtype=spec.dtype).reshape(spec.shape)
        if size
        else torch.empty(spec.shape, dtype=spec.dtype)
    )


def _external(path: Path, where: str, tensor: Any, size: int) -> tuple[Path, int]:
    """File and first byte of an initializer, which must be a place in a file of the graph's directory."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location, place = facts.get("location", ""), PurePosixPath(facts.get("location", ""))
    if not location.isprintable() or place.is_absolute() or ".." in place.parts or "\\" in location or not place.name:
        raise CheckpointError(f"{where} lies in {show(location)}, no file in the directory of the graph")
    numbers = {key: facts.get(key, "0" if key == "offset" else str(size)) for key in ("offset", "length")}
    if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers.values()):
        raise CheckpointError(f"{where} has offset and length {show(list(numbers.values()))}, no numbers of bytes")
    start, length = int(numbers["offset"]), int(numbers["length"])
    if length != size:
        raise CheckpointError(f"{where} has {length:,} bytes of external data, its dtype and shape take {size:,}")
    file = path.parent / place
    if not is_inside(file, path.parent) or not file.resolve().is_file():
        raise CheckpointError(f"{where} lies in {show(location)}, which is not there; complete the download")
    if start + length > file.stat().st_size:
        raise CheckpointError(
            f"{where} ends at byte {start + length:,} of {show(location)}, which has {file.stat().st_size:,}"
        )
    return file, start


@final
class _Found:
    """Weights while they are found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights: dict[str, Weight] = {}
        self.taken: set[str] = set()
        self.edits: dict[str, Callable[[Tensor], Tensor]] = {}
        self._parts: dict[str, tuple[_Stored, Spec, tuple[int, ...] | None]] = {}

    def add(self, weight: Weight, parts: Mapping[str, tuple[_Stored, Spec, tuple[int, ...] | None]]) -> None:
        """Take a weight with its stored tensors: name here to initializer, what it is seen as, and its strides.

        Raises:
            FormatError: another weight has that name, unless it is the same.
        """
        self.taken |= {stored.name for stored, _, _ in parts.values()}
        if weight.name in self.weights:
            if self.weights[weight.name] == weight and all(
                self._parts.get(name) == part for name, part in parts.items()
            ):
                return
            raise FormatError(f"{self.path}: there are two weights for {show(weight.name)}")
        for stored, spec, _ in parts.values():
            if prod(spec.shape) != prod(stored.spec.shape) or spec.dtype.itemsize != stored.spec.dtype.itemsize:
                raise FormatError(
                    f"{self.path}: {show(stored.name)} is {stored.spec.dtype} {list(stored.spec.shape)}, not "
                    f"{spec.dtype} {list(spec.shape)}"
                )
        self.weights[weight.name] = weight
        self._parts |= parts

    def model(self) -> OnnxModel:
        """What was found."""
        slots, values, sizes = dict[Path, dict[str, Slot]](), dict[Path, dict[str, Tensor]](), dict[Path, int]()
        for name, (stored, spec, stride) in self._parts.items():
            count = prod(spec.shape)
            slots.setdefault(stored.file, {})[name] = Slot(spec, stored.start, count, stride)
            values.setdefault(stored.file, {})
            sizes[stored.file] = stored.file.stat().st_size
            if stored.value is not None:
                flat = stored.value.reshape(-1).view(spec.dtype)
                values[stored.file][name] = (
                    flat.reshape(spec.shape) if stride is None else flat.as_strided(spec.shape, stride)
                )
        made = {file: WeightFile(file, sizes[file], table, values=values[file]) for file, table in slots.items()}
        files = {name: made[stored.file] for name, (stored, _, _) in self._parts.items()}
        return OnnxModel(files, self.weights | self._blocks(), self.edits)

    def _blocks(self) -> dict[str, Weight]:
        """Weights that are blocks of rows of one, with the rows that they are.

        Raises:
            FormatError: blocks, or places of rows, that make no whole.
        """
        found: dict[str, Weight] = {}
        for whole in {whole for name in self.weights if (whole := whole_of(name))}:
            numbered = (self.weights.get(block_name(whole, number)) for number in count())
            blocks = [block for block in takewhile(lambda block: block is not None, numbered) if block]
            if len(blocks) > 1:
                runs = self._runs(whole, blocks)
                found |= {block.name: replace(block, rows=rows) for block, rows in zip(blocks, runs, strict=True)}
        return found

    def _runs(self, whole: str, blocks: list[Weight]) -> list[Runs]:
        """The rows of each block: those that are next, or those that the places of rows tell."""
        ends = [0, *accumulate(block.shape[0] for block in blocks)]
        stored, *_ = self._parts.get(places_name(whole), (None,))
        if len({block.shape[1:] for block in blocks}) > 1:
            raise FormatError(f"{self.path}: blocks of {show(whole)} have columns of different number")
        if stored is None:
            return [((first, last),) for first, last in pairwise(ends)]
        order = _read(stored) if stored.dims == (ends[-1],) and stored.spec.dtype == torch.int32 else torch.empty(0)
        inside = [((order >= first) & (order < last)).nonzero().flatten() for first, last in pairwise(ends)]
        runs = [runs_of(rows.tolist()) for rows in inside]
        if [len(rows) for rows in inside] != [block.shape[0] for block in blocks] or not _canonical(order, inside):
            raise FormatError(
                f"{self.path}: {show(places_name(whole))} has not each row of {show(whole)} once, in order"
            )
        return runs


def _canonical(order: Tensor, inside: list[Tensor]) -> bool:
    """Whether rows of each block are in their order, and each place is there."""
    return torch.equal(order[torch.cat(inside)], torch.arange(len(order), dtype=order.dtype))


def _scopes(node: Any) -> str:
    """The module that a node belongs to, as its exporter noted it; empty where it did not."""
    facts = {entry.key: entry.value for entry in node.metadata_props}
    try:
        scopes = json.loads(facts.get(_SCOPES, "[]").replace("'", '"'))
    except ValueError:
        scopes = []
    modules = [scope for scope in scopes if isinstance(scope, str)][:-1]
    if modules and modules[-1]:
        return str(modules[-1])
    match = re.fullmatch(r"/(?:[\w.]+/)*[\w.]+", node.name)
    return ".".join(node.name.strip("/").split("/")[:-1]) if match else ""


def _weight_name(node: Any, stored: str) -> str:
    """The name that a weight has in its model, as far as node and initializer tell."""
    bare = stored
    while _SUFFIX.search(bare):
        bare = _SUFFIX.sub("", bare)
    module = _scopes(node) if _ANONYMOUS.fullmatch(bare) else ""
    if module:
        return f"{module}.weight"
    bare = re.sub(r"\.MatMul\.weight$", ".weight", bare)
    return bare if bare.endswith(".weight") else f"{bare}.weight"


def _attributes(node: Any) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _of_matmul_nbits(graph: _Graph, node: Any, found: _Found) -> None:
    """The weight of a `MatMulNBits`; shapes of older versions, flat scales and zero points, are the same bytes."""
    codes, scales = graph.wanted(node, 1, "codes"), graph.wanted(node, 2, "scales")
    facts = _attributes(node)
    bits, size, shape = facts.get("bits", 4), facts.get("block_size", 0), (facts.get("N", 0), facts.get("K", 0))
    if bits not in layouts.BITS or not 16 <= size <= 2**30 or size & (size - 1) or min(shape) < 1:
        raise FormatError(
            f"{graph.path}: {_named(node)} of {bits} bits, block_size {size}, N {shape[0]}, K {shape[1]} is not read"
        )
    if facts.get("weight_prepacked", 0) or (len(node.input) > 4 and node.input[4]):
        raise FormatError(f"{graph.path}: {_named(node)} has prepacked weights or g_idx, which are not read")
    zeros = graph.wanted(node, 3, "zero points") if len(node.input) > 3 and node.input[3] else None
    if scales.spec.dtype not in SCALE_TYPES or (zeros and zeros.spec.dtype not in (torch.uint8, scales.spec.dtype)):
        raise FormatError(
            f"{graph.path}: {_named(node)} has scales of {scales.spec.dtype} or zero points of another type"
        )
    kind = "" if zeros is None else "-asym" if zeros.spec.dtype == torch.uint8 else "-fzero"
    name = _weight_name(node, codes.name)
    _add(found, name, shape, parse(f"int{bits}-g{size}{kind}-{SCALE_TYPES[scales.spec.dtype]}"), [codes, scales, zeros])


def _of_lookup(graph: _Graph, node: Any, found: _Found) -> None:
    """The weight of a `GatherBlockQuantized` of bytes, whose codes are those of `MatMulNBits`."""
    codes, scales = graph.wanted(node, 0, "codes"), graph.wanted(node, 2, "scales")
    zeros = graph.wanted(node, 3, "zero points") if len(node.input) > 3 and node.input[3] else None
    facts, where = _attributes(node), f"{graph.path}: {_named(node)}"
    bits, size, across = facts.get("bits", 4), facts.get("block_size", 128), facts.get("quantize_axis", 1)
    if codes.kind != 2 or bits not in layouts.BITS or not 16 <= size <= 2**30 or size & (size - 1) or across != 1:
        raise FormatError(f"{where} of {bits} bits, block_size {size}, codes of {codes.spec.dtype} is not read")
    if len(scales.dims) != 2 or facts.get("gather_axis", 0) or scales.spec.dtype not in SCALE_TYPES:
        raise FormatError(f"{where} has scales {scales.spec.dtype} {list(scales.dims)}, or gathers no rows")
    scheme = parse(f"int{bits}-g{size}{'-asym' if zeros else ''}-{SCALE_TYPES[scales.spec.dtype]}")
    cols = graph.columns(node, scales.dims[1] * size, size)
    _add(found, _weight_name(node, codes.name), (scales.dims[0], cols), scheme, [codes, scales, zeros])


def _of_rows_looked_up(graph: _Graph, node: Any, found: _Found, codes: _Stored) -> None:
    """An int8 matrix whose rows are dequantized after they are looked up, with a scale of the row, or of all."""
    several = graph.looked_up(node.input[1])
    scales = several or graph.source(node.input[1])
    zero = node.input[2] if len(node.input) > 2 and node.input[2] else None
    zeros = (graph.looked_up(zero) or graph.source(zero)) if zero else None
    alike = zeros is None or zeros.dims == (scales.dims if scales else None)
    fits = scales is not None and len(codes.dims) == 2 and prod(scales.dims) == (codes.dims[0] if several else 1)
    if scales is None or not fits or not alike or (zero and zeros is None):
        raise FormatError(f"{graph.path}: {_named(node)} of rows that are looked up has no scale of each, or of all")
    _of_rows(graph, node, found, codes, scales, zeros, False, 0)


def _add(found: _Found, name: str, shape: tuple[int, int], scheme: Scheme, parts: list[_Stored | None]) -> None:
    stored = [part for part in parts if part is not None]
    weight = Weight(name, shape, stored[1].spec.dtype, scheme)
    layout = layouts.layout(weight)
    found.add(weight, {key: (part, spec, None) for (key, spec), part in zip(layout.items(), stored, strict=True)})


def _of_dequantize(graph: _Graph, node: Any, found: _Found) -> None:
    """The matrix of a `DequantizeLinear`; what it does to anything else is no weight's."""
    codes = graph.source(node.input[0]) if node.input else None
    if codes is None and node.input and (codes := graph.looked_up(node.input[0])) is not None:
        _of_rows_looked_up(graph, node, found, codes)
        return
    if codes is None or len(codes.dims) != 2:
        return
    facts, scales = _attributes(node), graph.wanted(node, 1, "scales")
    zeros = graph.wanted(node, 2, "zero points") if len(node.input) > 2 and node.input[2] else None
    turned = any(user.op_type == "MatMul" for user in graph.users.get(node.output[0], ()))
    size, axis = facts.get("block_size", 0), facts.get("axis", 1) % 2
    if size:
        _of_groups(graph, node, found, (codes, scales, zeros), turned, axis, size)
    elif codes.kind in _HALVES:
        raise FormatError(f"{graph.path}: {_named(node)} of 4 bits has no blocks, which are not read")
    else:
        _of_rows(graph, node, found, codes, scales, zeros, turned, axis)


def _of_groups(
    graph: _Graph,
    node: Any,
    found: _Found,
    parts: tuple[_Stored, _Stored, _Stored | None],
    turned: bool,
    axis: int,
    size: int,
) -> None:
    """A matrix in groups along its inputs, of 4 or 8 bits: the bytes of `MatMulNBits`, or those of the transpose."""
    where, (codes, scales, zeros) = f"{graph.path}: {_named(node)}", parts
    rows, cols = codes.dims[::-1] if turned else codes.dims
    bits, blocks = 4 if codes.kind in _HALVES else 8, cols // max(size, 1)
    if codes.kind not in (2, 3, *_HALVES) or scales.spec.dtype not in SCALE_TYPES or axis != (0 if turned else 1):
        raise FormatError(f"{where} has blocks of {codes.spec.dtype} along axis {axis}, which are not read")
    if size < 16 or size & (size - 1) or cols % size or (rows * turned) % 2 * (bits == 4):
        raise FormatError(f"{where} has blocks of {size} in {list(codes.dims)}, which MatMulNBits would not have")
    wanted = (blocks, rows) if turned else (rows, blocks)
    if any(part is not None and part.dims != wanted for part in (scales, zeros)):
        raise FormatError(f"{where} has no scale, or no zero point, for each of {list(wanted)} blocks")
    if codes.kind != (zeros.kind if zeros else _SIGNED[bits == 4]):
        raise FormatError(f"{where} has zero points of another type than its codes, or codes from 0 on without any")
    symmetric = zeros is None or _in_the_middle(zeros)
    if not symmetric and bits == 4 and blocks % 2:
        raise FormatError(f"{where} has {blocks} blocks a row with zero points of 4 bits; an even number is read")
    scheme = parse(f"int{bits}-g{size}{'' if symmetric else '-asym'}-{SCALE_TYPES[scales.spec.dtype]}")
    weight = Weight(_weight_name(node, codes.name), (rows, cols), scales.spec.dtype, scheme)
    stored, strides = [codes, scales, *([] if symmetric or zeros is None else [zeros])], (None, (1, rows), None)
    layout = layouts.layout(weight)
    found.add(
        weight,
        {key: (part, spec, stride if turned else None)
         for (key, spec), part, stride in zip(layout.items(), stored, strides, strict=False)},
    )  # fmt: skip
    found.taken |= {zeros.name} if zeros else set()
    for key, part in zip(layout, stored, strict=True):
        if part is not scales and (turned or part.kind in _SIGNED):
            found.edits[key] = partial(_respelled, part, turned)


def _in_the_middle(zeros: _Stored) -> bool:
    """Whether zero is where it is with symmetric weights."""
    middle = 0 if zeros.kind in _SIGNED else 8 if zeros.kind in _HALVES else 128
    return bool((_values(zeros, _read(zeros)) == middle).all())


def _values(stored: _Stored, data: Tensor) -> Tensor:
    """Codes or zero points in their shape, one a byte, signed ones as they lie in the file."""
    flat = data.contiguous().reshape(-1).view(torch.uint8)
    if stored.kind in _HALVES:
        flat = torch.stack([flat & 15, flat >> 4], -1).reshape(-1)[: prod(stored.dims)]
    return flat.reshape(stored.dims)


def _respelled(stored: _Stored, turned: bool, data: Tensor) -> Tensor:
    """The bytes of codes or zero points as `MatMulNBits` has them: from 0 on, `[outputs, inputs]`."""
    values, half = _values(stored, data), stored.kind in _HALVES
    if stored.kind in _SIGNED:
        values = values ^ (8 if half else 128)
    values = (values.T if turned else values).reshape(-1)
    packed = values[0::2] | values[1::2] << 4 if half else values
    return packed.contiguous().view(data.dtype).reshape(data.shape)


def _of_rows(
    graph: _Graph,
    node: Any,
    found: _Found,
    codes: _Stored,
    scales: _Stored,
    zeros: _Stored | None,
    turned: bool,
    axis: int,
) -> None:
    """An int8 matrix with a scale per row or one; `turned` where it is stored `[inputs, outputs]`."""
    where = f"{graph.path}: {_named(node)}"
    if codes.spec.dtype not in (torch.int8, torch.uint8) or scales.spec.dtype not in SCALE_TYPES:
        raise FormatError(f"{where} of {codes.spec.dtype} with scales of {scales.spec.dtype} is not read")
    if zeros and (zeros.spec.dtype != codes.spec.dtype or prod(zeros.spec.shape) != prod(scales.spec.shape)):
        raise FormatError(f"{where} has zero points of {zeros.spec.dtype} {list(zeros.spec.shape)}")
    rows, cols = codes.spec.shape[::-1] if turned else codes.spec.shape
    single = prod(scales.spec.shape) == 1
    if not single and axis != (1 if turned else 0):
        raise FormatError(f"{where} has scales along the inputs of its weight, which are not read")
    symmetric = _symmetric(found, codes, zeros)
    scheme = parse(
        f"int8-{'tensor' if single else 'row'}{'' if symmetric else '-asym'}-{SCALE_TYPES[scales.spec.dtype]}"
    )
    weight = Weight(_weight_name(node, codes.name), (rows, cols), scales.spec.dtype, scheme)
    stored = [codes, scales, *([] if symmetric or zeros is None else [zeros])]
    layout = layouts.layout(weight)
    strides = [(1, rows) if turned else None, None, None]
    found.add(
        weight, {k: (part, s, stride) for (k, s), part, stride in zip(layout.items(), stored, strides, strict=False)}
    )
    if zeros is not None:
        found.taken.add(zeros.name)
    signed = codes.spec.dtype == torch.int8
    if signed != symmetric:
        for key in [key for key, part in zip(layout, stored, strict=False) if part is not scales]:
            found.edits[key] = _flip


def _flip(tensor: Tensor) -> Tensor:
    """Signed codes as those from 0 on, and back."""
    return (tensor.contiguous().view(torch.uint8) ^ 128).view(tensor.dtype)


def _symmetric(found: _Found, codes: _Stored, zeros: _Stored | None) -> bool:
    """Whether zero is where it is with symmetric weights: 0 of signed codes, 128 of those from 0 on."""
    if zeros is None:
        return codes.spec.dtype == torch.int8
    middle = 0 if zeros.spec.dtype == torch.int8 else 128
    return bool((_read(zeros) == middle).all())


def _read(stored: _Stored) -> Tensor:
    """The values of a small initializer."""
    if stored.value is not None:
        return stored.value
    slot = Slot(stored.spec, stored.start, prod(stored.spec.shape))
    return WeightFile(stored.file, stored.file.stat().st_size, {stored.name: slot}).tensor(stored.name)


def _of_matmul_integer(graph: _Graph, node: Any, found: _Found) -> None:
    """The weight of a dynamically quantized product, `[inputs, outputs]`; its scale is in the product that follows."""
    codes = graph.source(node.input[1]) if len(node.input) > 1 else None
    if codes is None:
        return
    zeros = graph.wanted(node, 3, "zero points") if len(node.input) > 3 and node.input[3] else None
    scales = next(_scales_after(graph, node), None)
    if scales is None or len(codes.spec.shape) != 2:
        raise FormatError(f"{graph.path}: {_named(node)} has no scales of its weight in what follows")
    _of_rows(graph, node, found, codes, scales, zeros, True, 1)


def _scales_after(graph: _Graph, node: Any) -> Iterator[_Stored]:
    """Float initializers by which a result, or what it is multiplied with, is multiplied."""
    for cast in graph.users.get(node.output[0], ()):
        for product in graph.users.get(cast.output[0], ()) if cast.op_type == "Cast" else ():
            makers = [graph.makers.get(name) for name in product.input if product.op_type == "Mul"]
            for maker in [maker for maker in makers if maker is not None and maker.op_type == "Mul"]:
                yield from (found for name in maker.input if (found := graph.source(name)) is not None)


def _of_float(graph: _Graph, name: str, found: _Found) -> None:
    """A tensor that is not quantized; a matrix without a name of its own that products take is a linear layer's."""
    stored, users = graph.stored[name], graph.users.get(name, ())
    weight, turned = name, False
    if _ANONYMOUS.fullmatch(name):
        products = [user for user in users if user.op_type == "MatMul" and list(user.input)[1:] == [name]]
        if len(stored.spec.shape) != 2 or not products:
            return
        weight, turned = _weight_name(products[0], name), True
    elif stored.value is not None and not (stored.spec.dtype.is_floating_point and stored.spec.shape):
        return
    if stored.kind in _HALVES:
        return
    shape = stored.spec.shape[::-1] if turned else stored.spec.shape
    stride = (1, shape[0]) if turned else None
    found.add(Weight(weight, shape, stored.spec.dtype), {weight: (stored, Spec(stored.spec.dtype, shape), stride)})
