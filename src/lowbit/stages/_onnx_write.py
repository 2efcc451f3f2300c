"""The graph of an ONNX model from a plan: `torch.onnx` makes it, its weights are places in the safetensors files.

It is made before the first weight is, of a model without any: what cannot be exported is known at once. It computes in
float32; what is stored in 16 bits goes through a `Cast`, which onnxruntime does once, when it loads the model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from lowbit import __version__
from lowbit.errors import UnsupportedError, UsageError
from lowbit.formats import Spec, Weight
from lowbit.formats.onnx import by_row
from lowbit.schemes import Scheme
from lowbit.stages._model import Blueprint, open_blueprint, silent_transformers
from lowbit.stages._rows import blocks_of, places_name, whole_of
from lowbit.stages._shard import Shard
from lowbit.stages._weightfile import WeightFile, one_line
from lowbit.stages.checkpoint import Checkpoint
from lowbit.stages.plan import Entry, Plan

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "model.onnx"
OPSET = 21  # the first that has blocks in DequantizeLinear and 4-bit types; IR version 10
_MICROSOFT = "com.microsoft"
_INT32 = 6  # of TensorProto.DataType
_SKIP = "leave it as it is (--skip)"


@final
class _Logits(nn.Module):
    """A model as a function of tokens and mask to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, sequence, vocabulary]` of token ids and a mask `[batch, sequence]`."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def onnx_shard(plan: Plan, checkpoint: Checkpoint, shards: Sequence[Shard]) -> Shard:
    """`model.onnx` for a plan whose tensors are in these files; it has none itself.

    Raises:
        UsageError: the packages that make it are not there.
        UnsupportedError: there is no graph for this model, or its weights are not its parameters.
        CheckpointError: no usable `config.json`.
    """
    try:
        import onnx_ir as ir
        from onnxscript import optimizer
    except ImportError:
        raise UsageError("--format onnx needs the packages onnx and onnxscript: pip install lowbit[onnx]") from None

    blueprint = open_blueprint(checkpoint, torch.float32)
    model, sources = blueprint.hollow()
    entries = {entry.weight.name: entry for entry in plan.entries}
    inside = {f"model.{name}": _entries(name, found, entries) for name, found in sources.items()}
    made = _export(blueprint, model)
    # As inputs they are unknown to the optimizer, which would compute with them.
    parameters = [made.graph.initializers.pop(name) for name in list(made.graph.initializers) if name in inside]
    made.graph.inputs.extend(parameters)
    with _silent():
        optimizer.optimize_ir(made)
    _plain(made)
    builder = _Builder(made, plan, {name: (shard, place) for shard in shards for name, place in shard.offsets.items()})
    for parameter in parameters:
        made.graph.inputs.remove(parameter)
        builder.put(parameter, inside[str(parameter.name)])
    builder.finish()
    header = ir.to_proto(made).SerializeToString(deterministic=True)
    return Shard(FILE, {}, header, len(header), lambda path: WeightFile(path, len(header), {}))


def _entries(parameter: str, sources: frozenset[str], entries: Mapping[str, Entry]) -> list[Entry]:
    """The stored weight that is a parameter, or the blocks of its rows."""
    found = [entries[name] for name in sources]
    blocks = blocks_of({entry.weight.name: entry.weight for entry in found})
    if len(blocks) == 1 and all(entry.weight.rows for entry in found):
        return [entries[block.name] for block in next(iter(blocks.values()))]
    if len(sources) != 1:
        raise UnsupportedError(
            f"the model merges {len(sources)} weights of the checkpoint into {parameter}; there is no ONNX graph for "
            "stacked experts here, use another --format"
        )
    return [entries[entry.tied] if entry.tied else entry for entry in found]


def _export(blueprint: Blueprint, model: nn.Module) -> ir.Model:
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    tokens = torch.zeros(2, 8, dtype=torch.long)
    try:
        with silent_transformers(), _silent(), torch.no_grad():
            program: Any = torch.onnx.export(
                _Logits(model).eval(), (tokens, torch.ones_like(tokens)), dynamo=True, optimize=False, verbose=False,
                opset_version=OPSET, dynamic_shapes=({0: batch, 1: sequence},) * 2,
                input_names=["input_ids", "attention_mask"], output_names=["logits"],
            )  # fmt: skip
    except Exception as error:
        raise UnsupportedError(
            f"torch.onnx.export makes no graph of {blueprint.kind.__name__}: {one_line(error)}; use another --format"
        ) from error
    found: ir.Model = program.model
    return found


@contextmanager
def _silent() -> Iterator[None]:
    """No warnings and no prints of the exporter: what matters of them is raised."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _plain(model: ir.Model) -> None:
    """Without what the exporter notes for itself, as traces of this machine's files."""
    model.producer_name, model.producer_version = "lowbit", __version__
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _axis(node: ir.Node) -> int:
    found = node.attributes.get("axis")
    return int(found.value) if found else 0


def _scheme(weight: Weight) -> Scheme:
    assert weight.scheme is not None
    return weight.scheme


@final
class _Builder:
    """Puts stored weights into a graph in the place of parameters."""

    def __init__(self, model: ir.Model, plan: Plan, places: Mapping[str, tuple[Shard, tuple[int, Spec]]]) -> None:
        self._model, self._graph, self._plan, self._places = model, model.graph, plan, places
        self._stored: dict[str, ir.Value] = {}
        self._floats: dict[str, ir.Value] = {}
        self._first: ir.Node = model.graph[0]

    def put(self, parameter: ir.Value, entries: Sequence[Entry]) -> None:
        """Let what uses a parameter use the stored weight, or its blocks of rows."""
        weights = [entry.weight for entry in entries]
        if len(weights) == 1 and weights[0].scheme is None:
            parameter.replace_all_uses_with(self._float(weights[0].name))
            return
        for node in [node for node, _ in parameter.uses()]:
            if node.op_type == "Gather" and node.inputs[0] is parameter and not _axis(node):
                self._lookup(node, weights)
            elif len(weights) > 1 or not by_row(_scheme(weights[0])):
                self._product(node, parameter, weights)
        if len(weights) == 1 and by_row(_scheme(weights[0])):
            parameter.replace_all_uses_with(self._whole(weights[0]))

    def _whole(self, weight: Weight) -> ir.Value:
        """A weight as the model has it, in float32."""
        if weight.scheme is None:
            return self._float(weight.name)
        if weight.name not in self._floats:
            names = self._plan.rules.layout(weight)
            codes, scales, *zeros = names
            inputs = [self._value(codes), self._float(scales), *map(self._value, zeros)]
            found = self._node("DequantizeLinear", inputs, {"axis": 0} if weight.scheme.block.rows else {})
            self._floats[weight.name] = self._node("Transpose", [found], {"perm": [1, 0]}) if weight.swapped else found
        return self._floats[weight.name]

    def _product(self, node: ir.Node, parameter: ir.Value, weights: Sequence[Weight]) -> None:
        """Put `MatMulNBits` in the place of each product with a weight that is in groups, or in blocks of rows."""
        swapped = weights[0].swapped
        if node.op_type == "Transpose" and not swapped:
            for product in [user for user, _ in node.outputs[0].uses()]:
                self._replace(product, node.outputs[0], weights, False)
            self._graph.remove(node, safe=True)
        else:
            self._replace(node, parameter, weights, not swapped)

    def _replace(self, node: ir.Node, matrix: ir.Value, weights: Sequence[Weight], turned: bool) -> None:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        fits = node.op_type == "MatMul" or (node.op_type == "Gemm" and plain)
        if not fits or list(node.inputs)[1] is not matrix or bool(attributes.get("transB", 0)) != turned:
            raise UnsupportedError(
                f"{weights[0].name} has its use in {node.op_type}, and MatMulNBits is for products alone; {_SKIP}"
            )
        found = self._in_order([self._multiplied(node, weight) for weight in weights], weights, node)
        for bias in [value for value in node.inputs[2:] if value is not None]:
            found = self._node("Add", [found, bias], {}, before=node)
        self._exchange(node, found)

    def _exchange(self, node: ir.Node, found: ir.Value) -> None:
        """Let what uses the result of a node use this, and drop the node."""
        found.shape, found.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(found, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)

    def _in_order(self, products: Sequence[ir.Value], weights: Sequence[Weight], node: ir.Node) -> ir.Value:
        """Outputs of the blocks of a weight as those of the whole."""
        if len(products) == 1:
            return products[0]
        found = self._node("Concat", products, {"axis": -1}, before=node)
        order = self._places_of(weights)
        return found if order is None else self._node("Gather", [found, order], {"axis": -1}, before=node)

    def _multiplied(self, node: ir.Node, weight: Weight) -> ir.Value:
        """The product of the inputs of a node with a weight, or a block."""
        scheme, rows = weight.scheme, node.inputs[0]
        assert rows is not None
        if scheme is None or by_row(scheme):
            matrix = self._node("Transpose", [self._whole(weight)], {"perm": [1, 0]})
            return self._node("MatMul", [rows, matrix], {}, before=node)
        facts = {
            "K": weight.shape[1], "N": weight.shape[0], "bits": scheme.grid.bits, "block_size": scheme.block.cols
        }  # fmt: skip
        return self._node("MatMulNBits", [rows, *self._pieces(weight)], facts, before=node, domain=_MICROSOFT)

    def _lookup(self, node: ir.Node, weights: Sequence[Weight]) -> None:
        """Rows that are looked up, each dequantized after that, in its block where there are several."""
        at, order, start = node.inputs[1], self._places_of(weights), 0
        assert at is not None
        if len(weights) == 1:
            self._exchange(node, self._rows(node, weights[0], at))
            return
        if order is None:
            at = self._node("Cast", [at], {"to": _INT32}, before=node)
        else:
            at = self._node("Gather", [order, at], {}, before=node)
        found, last = None, self._node("Unsqueeze", [at, self._constant([-1], torch.int64)], {}, before=node)
        for weight in weights:
            first, count = self._constant(start, torch.int32), weight.shape[0]
            inside = self._node("Sub", [at, first], {}, before=node)
            bounds = [self._constant(end, torch.int32) for end in (0, count - 1)]
            rows = self._rows(node, weight, self._node("Clip", [inside, *bounds], {}, before=node))
            if found is not None:
                beyond = self._node("GreaterOrEqual", [last, first], {}, before=node)
                rows = self._node("Where", [beyond, rows, found], {}, before=node)
            found, start = rows, start + count
        assert found is not None
        self._exchange(node, found)

    def _rows(self, node: ir.Node, weight: Weight, at: ir.Value) -> ir.Value:
        """Rows of a weight, or of a block, in float32."""
        import onnx_ir as ir

        scheme = weight.scheme
        if scheme is None:
            found = self._node("Gather", [self._value(weight.name), at], {}, before=node)
            kept = weight.dtype != torch.float32
            return self._node("Cast", [found], {"to": int(ir.DataType.FLOAT)}, before=node) if kept else found
        if not by_row(scheme):
            return self._rows_in_groups(node, weight, at)
        codes, *others = self._pieces(weight)
        codes = self._node("Gather", [codes, at], {}, before=node)
        if not scheme.block.rows:
            return self._node("DequantizeLinear", [codes, *others], {}, before=node)
        minus = self._constant([-1], torch.int64)
        each = [self._node("Gather", [other, at], {}, before=node) for other in others]
        each = [self._node("Unsqueeze", [other, minus], {}, before=node) for other in each]
        facts = {"axis": -1, "block_size": weight.shape[1]}
        return self._node("DequantizeLinear", [codes, *each], facts, before=node)

    def _rows_in_groups(self, node: ir.Node, weight: Weight, at: ir.Value) -> ir.Value:
        """Rows of what `MatMulNBits` multiplies with, without what fills the last group."""
        scheme, (rows, cols) = _scheme(weight), weight.shape
        if scheme.zero == "float":
            raise UnsupportedError(
                f"{weight.name} has its use in Gather, and GatherBlockQuantized has no float zero points; use "
                f"{replace(scheme, zero='int')}"
            )
        codes, *others = self._pieces(weight)
        codes = self._node("Reshape", [codes, self._constant([rows, -1], torch.int64)], {})
        facts = {"bits": scheme.grid.bits, "block_size": scheme.block.cols, "gather_axis": 0, "quantize_axis": 1}
        inputs = [codes, at, *others]
        found = self._node("GatherBlockQuantized", inputs, facts, before=node, domain=_MICROSOFT)
        if cols % scheme.block.cols:
            ends = [self._constant([end], torch.int64) for end in (0, cols, -1)]
            found = self._node("Slice", [found, *ends], {}, before=node)
        return found

    def _places_of(self, blocks: Sequence[Weight]) -> ir.Value | None:
        """The place of each row of a whole among those of its blocks; None where they are in order."""
        name = places_name(whole_of(blocks[0].name) or "")
        return self._value(name) if name in self._places else None

    def _pieces(self, weight: Weight) -> list[ir.Value]:
        """The stored tensors of a weight: codes and zero points as they are, float ones in float32."""
        return [self._float(name) for name in self._plan.rules.layout(weight)]

    def _constant(self, value: int | list[int], dtype: torch.dtype) -> ir.Value:
        """A number, or a list of these, in the graph."""
        import onnx_ir as ir

        node = ir.node("Constant", [], {"value": ir.Tensor(torch.tensor(value, dtype=dtype).numpy())})
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def _float(self, name: str) -> ir.Value:
        """A stored tensor in float32."""
        import onnx_ir as ir

        stored = self._value(name)
        if stored.dtype == ir.DataType.FLOAT or not self._places[name][1][1].dtype.is_floating_point:
            return stored
        if name not in self._floats:
            self._floats[name] = self._node("Cast", [stored], {"to": int(ir.DataType.FLOAT)})
        return self._floats[name]

    def _value(self, name: str) -> ir.Value:
        """A stored tensor: an initializer whose bytes are in a file beside the graph."""
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import from_torch_dtype

        if name not in self._stored:
            shard, (start, spec) = self._places[name]
            dtype, shape = from_torch_dtype(spec.dtype), ir.Shape(spec.shape)
            count = torch.Size(spec.shape).numel() * spec.dtype.itemsize
            data = ir.ExternalTensor(shard.file, start, count, dtype, shape=shape, name=name, base_dir="")
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=data)
            self._stored[name] = value
        return self._stored[name]

    def _node(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        facts: Mapping[str, Any],
        before: ir.Node | None = None,
        domain: str = "",
    ) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(kind, inputs, facts, domain=domain)
        self._graph.insert_before(before or self._first, node)
        return node.outputs[0]

    def finish(self) -> None:
        """Constants become nodes, so that initializers are the weights: those too that the graph does not use."""
        import onnx_ir as ir

        for name in list(self._graph.initializers):
            old = self._graph.initializers.pop(name)
            node = ir.node("Constant", [], {"value": ir.Tensor(old.const_value.numpy())})  # type: ignore[union-attr]
            self._graph.insert_before(self._graph[0], node)
            old.replace_all_uses_with(node.outputs[0])
        for name in self._places:
            self._graph.register_initializer(self._value(name))
        self._model.opset_imports[_MICROSOFT] = 1
