"""A `transformers` model over a checkpoint: built without weights, then filled as a whole or one part at a time.

Nothing here knows an architecture. `transformers` itself decides, through `from_pretrained`, which stored tensors make
which parameter (names, tied weights, merged experts) and how buffers begin; it is given stand-ins that are read, or
only traced, when it places them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.formats import Weight
from lowbit.stages._activations import round_inputs
from lowbit.stages._experts import Stack, stacks
from lowbit.stages._gguf import read_gguf
from lowbit.stages._gguf_config import require_told
from lowbit.stages._gguf_vocabulary import alone, tokenizer_documents
from lowbit.stages._plain_tokenizer import CLASSES, TYPES
from lowbit.stages._rows import blocks_of, is_places, joined
from lowbit.stages._weightfile import one_line, read_json, show
from lowbit.stages.checkpoint import Checkpoint, is_ahead, require_explained

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
else:  # the run-time check of annotations needs names, and importing these costs a second
    GenerationConfig = PreTrainedConfig = PreTrainedModel = PreTrainedTokenizerBase = object

# Tokens that classes of transformers have of themselves, where no file gives any.
_EMPTY = 8
# What `transformers` raises over a configuration, code or tokenizer that it cannot use.
_REFUSALS = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, ArithmeticError)
# Codes and scales of a quantized weight while it is unpacked, in bytes per element, beside the result.
_UNPACKING = 3


@final
class _Trace(Tensor):
    """A tensor without storage that knows the weights of the checkpoint it was made from, through any operation."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        traced = [_sources(leaf) for leaf in tree_leaves((args, kwargs))]
        for leaf in tree_leaves(out):
            if isinstance(leaf, cls):
                leaf.sources = frozenset().union(*traced)
        return out


def _sources(tensor: Any) -> frozenset[str]:
    return tensor.sources if isinstance(tensor, _Trace) else frozenset()


@final
class _Standin:
    """What `from_pretrained` gets for a weight; it asks for `standin[...].to(device, dtype)` when it places it."""

    # Its threads would unpack several tensors at once, which the memory estimate does not foresee.
    _one_at_a_time = threading.Lock()

    def __init__(self, checkpoint: Checkpoint, name: str, read: bool, kept: bool = False) -> None:
        self._checkpoint, self._name, self._read, self._kept = checkpoint, name, read, kept

    def __getitem__(self, index: object) -> _Standin:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype`, or its trace, with what is in it where that is kept."""
        if self._read:
            with self._one_at_a_time:
                return self._checkpoint.dequantized(self._name, dtype)
        weight = self._checkpoint.weights[self._name]
        if self._kept:
            made = self._checkpoint.dequantized(self._name, dtype)
        else:
            made = torch.empty(weight.held, dtype=dtype or weight.dtype, device="meta")
        trace: _Trace = made.as_subclass(_Trace)
        trace.sources = frozenset([self._name])
        return trace


@final
class _StackStandin:
    """What it gets for the tensor that holds all experts of a layer, where the checkpoint has them apart."""

    def __init__(self, stack: Stack, standins: Mapping[str, _Standin]) -> None:
        self._stack, self._standins = stack, standins

    def __getitem__(self, index: object) -> _StackStandin:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """As of one weight; of all that are in it."""
        experts = ([self._standins[name].to(device, dtype) for name in names] for names in self._stack.members)
        return self._stack.layout.join(experts)


@final
class _RowsStandin:
    """What it gets for a weight that the checkpoint has in blocks of rows."""

    def __init__(self, blocks: Sequence[Weight], standins: Mapping[str, _Standin]) -> None:
        self._blocks, self._standins = blocks, standins

    def __getitem__(self, index: object) -> _RowsStandin:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """As of one weight; of all blocks, in order."""
        found = [self._standins[block.name].to(device, dtype) for block in self._blocks]
        return joined(found, [block.rows for block in self._blocks])


@final
@dataclass(frozen=True)
class _Part:
    """A module that is filled and emptied as one: a block, or an embedding or linear layer outside of the blocks.

    Attributes:
        path: its name in the model.
        sources: the weights of the checkpoint that fill it.
        nbytes: most that it takes while it is filled.
        width: sum of the widths of its matrices, which bounds its activations.
    """

    path: str
    sources: frozenset[str]
    nbytes: int
    width: int


@final
@dataclass(frozen=True, eq=False)
class Blueprint:
    """A causal language model whose weights are still in its checkpoint. Made by `open_blueprint`.

    Attributes:
        checkpoint: where the weights are.
        config: of `transformers`, without what it says of quantization.
        dtype: of the weights and of the computation.
        kind: class of the model.
        vectors: whether the model that is traced has its vectors in memory, for `taken`.
    """

    checkpoint: Checkpoint
    config: PreTrainedConfig
    dtype: torch.dtype
    kind: type[PreTrainedModel]
    vectors: bool = False

    def resident(self) -> PreTrainedModel:
        """The model with all its weights in memory."""
        return self._with_rounded_inputs(self._build(self.checkpoint.weights.keys()))

    def with_parts(self, names: AbstractSet[str]) -> PreTrainedModel:
        """The model with these weights in memory; the others are without, and must be replaced before it runs."""
        return self._with_rounded_inputs(self._build(names))

    def taken(self) -> PreTrainedModel:
        """The model that was traced, which is not built again: its vectors are in memory, matrices are without."""
        model = self._skeleton
        del self.__dict__["_skeleton"]
        with torch._C.DisableTorchFunctionSubclass():
            for name, parameter in list(model.named_parameters()):
                if not parameter.is_meta:
                    path, _, last = name.rpartition(".")
                    plain = nn.Parameter(parameter.detach().as_subclass(Tensor), requires_grad=False)
                    setattr(model.get_submodule(path), last, plain)
        return model

    def linear_layers(self) -> Iterator[tuple[str, tuple[int, ...], frozenset[str]]]:
        """Modules that multiply their inputs by one matrix: path, `[outputs, inputs]`, and the weights that make it.

        They are `Linear`, and GPT-2's `Conv1D`, which holds its matrix transposed; no class that makes more of either.
        """
        from transformers.pytorch_utils import Conv1D

        for path, module in self._skeleton.named_modules():
            if is_linear(module.__class__) or module.__class__.forward is Conv1D.forward:
                shape: tuple[int, ...] = tuple(module.weight.shape)
                yield path, shape if isinstance(module, nn.Linear) else shape[::-1], _sources(module.weight)

    def readers(self) -> dict[str, tuple[type[nn.Module], int]]:
        """For each weight of the checkpoint a class that reads it, and of how many weights what it reads is made."""
        found: dict[str, tuple[type[nn.Module], int]] = {}
        for parameter, names in self.sources("").items():
            reader = type(self._skeleton.get_submodule(parameter.rpartition(".")[0]))
            found |= dict.fromkeys(names, (reader, len(names)))
        return found

    def streamed(self) -> PreTrainedModel:
        """The model with few weights in memory: each part is filled just before it runs, and emptied after it."""
        kept = self.checkpoint.weights.keys() - {name for part in self._parts for name in part.sources}
        model = self._build(kept)
        for part in self._parts:
            self._stream(model.get_submodule(part.path), part)
        return self._with_rounded_inputs(model)

    def _with_rounded_inputs(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, made to quantize activations where the checkpoint says that its runtime does."""
        if any(weight.activations for weight in self.checkpoint.weights.values()):
            source = self.checkpoint
            round_inputs(model, source.weights, self.sources(""), source.terms, source.factors)
        return model

    @cached_property
    def blocks(self) -> dict[str, frozenset[str]]:
        """Path of every block, in order, and the weights of the checkpoint that fill it."""
        paths = set(block_paths(self._skeleton))
        return {part.path: part.sources for part in self._parts if part.path in paths}

    @cached_property
    def tables(self) -> dict[str, frozenset[str]]:
        """Path of every embedding outside of the blocks, and the weights of the checkpoint that fill it."""
        return self._outside(nn.Embedding)

    @cached_property
    def layers(self) -> dict[str, frozenset[str]]:
        """The same of linear layers."""
        return self._outside(nn.Linear)

    def _outside(self, kind: type[nn.Module]) -> dict[str, frozenset[str]]:
        parts = (part for part in self._parts if part.path not in self.blocks)
        return {p.path: p.sources for p in parts if isinstance(self._skeleton.get_submodule(p.path), kind)}

    def filled(self, path: str) -> nn.Module:
        """One block with its weights in memory; experts run one after the other, each by products of its own."""
        return self._build(self.blocks[path], experts_implementation="eager").get_submodule(path)

    def sources(self, path: str, aliases: bool = False) -> dict[str, frozenset[str]]:
        """For each parameter of a module, the weights of the checkpoint that it is made of.

        `aliases`: under every name that it has, not only the first.
        """
        parameters = self._skeleton.get_submodule(path).named_parameters(remove_duplicate=not aliases)
        return {name: _sources(parameter) for name, parameter in parameters}

    def hollow(self) -> tuple[PreTrainedModel, dict[str, frozenset[str]]]:
        """The model with its buffers and weights that take no memory; and of which weights each of these is made."""
        model = self._build(frozenset())
        state = model.state_dict(keep_vars=True)
        sources = {name: found for name, tensor in state.items() if (found := _sources(tensor))}
        model.load_state_dict({name: _nothing(state[name]) for name in sources}, assign=True, strict=False)
        return model.requires_grad_(False), sources

    def _stream(self, module: nn.Module, part: _Part) -> None:
        empty = {name: _nothing(tensor) for name, tensor in module.state_dict().items()}
        module.load_state_dict(empty, assign=True)

        def fill(*_: object) -> None:
            filled = self._build(part.sources).get_submodule(part.path)
            module.load_state_dict(filled.state_dict(), assign=True)
            filled.load_state_dict(empty, assign=True)  # in a reference cycle it would keep them until it is collected

        def drop(*_: object) -> None:
            module.load_state_dict(empty, assign=True)

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop, always_call=True)

    @property
    def resident_bytes(self) -> int:
        """Most bytes of weights that `resident` takes, tied ones counted once."""
        return sum(_filled_bytes(tensor) for tensor in self._skeleton.parameters()) + self._reading_bytes

    @property
    def streamed_bytes(self) -> int:
        """Most bytes of weights that `streamed` takes at any time."""
        inside = {name for part in self._parts for name in part.sources}
        kept = sum(_filled_bytes(tensor) for tensor in self._skeleton.parameters() if not _sources(tensor) & inside)
        return kept + self.block_bytes

    @property
    def block_bytes(self) -> int:
        """Most bytes of one block's weights, or of an embedding, which is there at another time."""
        return max((part.nbytes for part in self._parts), default=0) + self._reading_bytes

    @property
    def width(self) -> int:
        """Of the hidden state."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def heads(self) -> int:
        """Of attention; 0 where there is none."""
        return int(getattr(self.config.get_text_config(), "num_attention_heads", 0) or 0)

    @property
    def _reading_bytes(self) -> int:
        quantized = [weight.shape for weight in self.checkpoint.weights.values() if weight.scheme]
        unpacked = _UNPACKING * max((torch.Size(shape).numel() for shape in quantized), default=0)
        return unpacked + self.checkpoint.view.made_bytes

    @property
    def attended(self) -> int:
        """Values of a token that attention gives where it is one function (`_attention.Remembered` keeps them)."""
        text = self.config.get_text_config()
        if self.config._attn_implementation != "sdpa" or not self.heads:
            return 0
        return self.heads * int(getattr(text, "head_dim", None) or text.hidden_size // self.heads)

    def token_bytes(self, context: int, inside: bool = False) -> int:
        """Bytes of activations per token, without the logits: an upper estimate from the widths of a block.

        `inside`: of the blocks alone, without what stands before and after them.
        """
        text, blocks = self.config.get_text_config(), self.blocks if inside else ()
        widths = (part.width for part in self._parts if not inside or part.path in blocks)
        width = 2 * max(widths, default=0) + 8 * int(text.hidden_size)
        if self.config._attn_implementation != "sdpa":  # scores, their softmax and its copy
            width += 3 * context * self.heads
        return width * self.dtype.itemsize

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """Longest sequence that the configuration allows; None where it names none."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def too_long(self, length: int) -> str | None:
        """What is to be said of sequences of so many tokens, where they are longer than the configuration allows.

        Raises:
            UsageError: the model cannot compute them, for it has a table of positions.
        """
        most = self.positions
        if most is None or length <= most:
            return None
        if self._has_positions(most):
            raise UsageError(
                f"sequences of {length:,} tokens are too long for {self.checkpoint.path}, which has {most:,} positions "
                f"(max_position_embeddings); --sequence-length {most} is the most that it takes"
            )
        return (
            f"windows of {length:,} tokens are longer than the model was made for (max_position_embeddings {most:,}), "
            "and it may compute there what it never does in use; lower --sequence-length"
        )

    def _has_positions(self, most: int) -> bool:
        """Whether a position beyond the last is an error: it is looked up in an embedding or buffer of that length."""
        model = self._skeleton
        tables = [each for each in model.modules() if isinstance(each, nn.Embedding)]
        words = model.get_input_embeddings()
        rows = [each.num_embeddings for each in tables if each is not words]
        sides = [side for _, buffer in model.named_buffers() for side in buffer.shape]
        # OPT's table has two rows more.
        return any(most <= count <= most + 2 for count in rows) or most in sides

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The model without any weight, every parameter a trace."""
        vectors = {name for name, weight in self.checkpoint.weights.items() if self.vectors and len(weight.shape) < 2}
        return self._build(frozenset(), vectors)

    @cached_property
    def _parts(self) -> list[_Part]:
        skeleton = self._skeleton
        blocks = block_paths(skeleton)
        inside = tuple(f"{path}." for path in blocks)
        outside = [
            path
            for path, module in skeleton.named_modules()
            if isinstance(module, nn.Embedding | nn.Linear) and not path.startswith(inside or "no block")
        ]
        experts = getattr(self.config.get_text_config(), "num_experts_per_tok", None)
        return [
            _make_part(path, skeleton.get_submodule(path), experts if path in blocks else 0)
            for path in [*blocks, *outside]
        ]

    @cached_property
    def _stacks(self) -> dict[str, Stack]:
        """Tensors with all experts of a layer that the class wants, of what the checkpoint has apart."""
        return stacks(str(self.config.model_type), self.checkpoint.weights.keys())

    @property
    def turned(self) -> frozenset[str]:
        """Weights whose transpose the class has, in a stack of experts."""
        stacks = [stack for stack in self._stacks.values() if stack.layout.turned]
        return frozenset(name for stack in stacks for names in stack.members for name in names)

    def _build(self, read: AbstractSet[str], kept: AbstractSet[str] = frozenset(), **settings: Any) -> PreTrainedModel:
        """A model that has the weights named in `read`, and traces of the others.

        Traces of those in `kept` have what is in them too.

        Raises:
            CheckpointError: weights are missing, too many, or of another shape than the configuration says.
        """
        weights = self.checkpoint.weights
        plain = {
            name: _Standin(self.checkpoint, name, name in read, name in kept)
            for name, weight in weights.items()
            if not is_places(weight)
        }
        inside = {name for stack in self._stacks.values() for names in stack.members for name in names}
        standins: dict[str, _Standin | _StackStandin | _RowsStandin] = {
            name: standin for name, standin in plain.items() if name not in inside and not weights[name].rows
        }
        standins |= {name: _StackStandin(stack, plain) for name, stack in self._stacks.items()}
        standins |= {name: _RowsStandin(blocks, plain) for name, blocks in blocks_of(weights).items()}
        # The threads of `from_pretrained` know nothing of inference mode, and tensors of both modes do not go together.
        normal = torch.inference_mode(False)
        with (
            normal,
            silent_transformers(),
            refusals(f"{self.checkpoint.path} cannot be loaded as {self.kind.__name__}"),
        ):
            loaded: Any = self.kind.from_pretrained(
                None, config=self.config, state_dict=standins, dtype=self.dtype,
                ignore_mismatched_sizes=True, output_loading_info=True, **settings,
            )  # fmt: skip
        model, info = loaded
        found = {
            "weights are missing": info["missing_keys"],
            "weights have no place in the model": [
                name for name in info["unexpected_keys"] if not is_ahead(self.checkpoint.config, name)
            ],
            "weights have another shape": [name for name, *_ in info["mismatched_keys"]],
        }
        for what, wrong in found.items():
            if wrong:
                raise CheckpointError(
                    f"{self.checkpoint.path} does not fit its config.json: {len(wrong)} {what}, as "
                    f"{', '.join(map(show, sorted(wrong)[:3]))}; complete the checkpoint or mend the configuration"
                )
        model.name_or_path = model.config.name_or_path = str(self.checkpoint.path)
        filled: PreTrainedModel = model.eval()
        return filled


@cache
def is_linear(kind: type[nn.Module]) -> bool:
    """Whether a class computes `inputs @ weight.T + bias` and nothing more, maybe in words of its own.

    It is found by trying, so that no class needs to be known: on a plain layer, with inputs small and large.
    """
    if not issubclass(kind, nn.Linear) or kind.forward is nn.Linear.forward:
        return issubclass(kind, nn.Linear)
    forward: Any = kind.forward
    with torch.no_grad(), torch.device("cpu"):
        values = torch.arange(1, 61, dtype=torch.float32)
        inputs = values.sin().view(3, 4, 5) * torch.tensor([1.0, 1e-3, 1e6])[:, None, None]
        for bias in (None, nn.Parameter(values[:3].cos())):
            plain = nn.Linear(5, 3, bias is not None, device="meta")  # which takes no random numbers
            plain.weight, plain.bias = nn.Parameter(values[:15].cos().view(3, 5)), bias  # type: ignore[assignment]
            try:
                if not torch.allclose(forward(plain, inputs), plain(inputs)):
                    return False
            except _REFUSALS:
                return False
    return True


def _filled_bytes(tensor: Tensor) -> int:
    """Bytes of a parameter, and of its pieces where it is merged from several."""
    return tensor.numel() * tensor.element_size() * (2 if len(_sources(tensor)) > 1 else 1)


def _nothing(tensor: Tensor) -> Tensor:
    """A tensor of that shape without memory, on the device where it will be: code asks for the device of weights.

    It is NaN, so that a model that uses it, around the module whose call fills it, is found out.
    """
    value = float("nan") if tensor.dtype.is_floating_point else 0
    return torch.tensor(value, dtype=tensor.dtype).expand(tensor.shape)


def _make_part(path: str, module: nn.Module, experts: int | None) -> _Part:
    tensors = list(module.state_dict(keep_vars=True).values())
    sources = frozenset().union(*map(_sources, tensors))
    return _Part(path, sources, sum(map(_filled_bytes, tensors)), sum(_width(tensor, experts) for tensor in tensors))


def _width(tensor: Tensor, experts: int | None) -> int:
    """Values per token that a parameter stands for: outputs of a matrix, of those of a stack that a token sees.

    A matrix with one short side is a state per channel; what runs over it makes a value for each of its elements.
    """
    if tensor.ndim < 2:
        return 0
    high, wide = tensor.shape[-2:]
    stacked = min(tensor.shape[:-2].numel(), experts or tensor.shape[:-2].numel())
    return max(high, wide) * stacked if min(high, wide) > 16 or tensor.ndim > 2 else 2 * high * wide


def block_paths(model: nn.Module) -> list[str]:
    """Names of a model's blocks: the members of the module list that holds most weights, the outermost of equals."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    path, blocks = max(lists, key=lambda item: sum(tensor.numel() for tensor in item[1].parameters()))
    return [f"{path}.{name}" for name, _ in blocks.named_children()]


def open_blueprint(checkpoint: Checkpoint, dtype: torch.dtype, vectors: bool = False) -> Blueprint:
    """Find the configuration and the class of a checkpoint's model.

    Raises:
        UsageError: the model needs the code that it brings, and is not trusted.
        CheckpointError: no usable `config.json`, or no causal language model of `transformers`.
    """
    require_explained(checkpoint)
    root, config = checkpoint.root, open_config(checkpoint)
    with (
        silent_transformers(),
        _own_code(checkpoint),
        refusals(f"{root} is no causal language model"),
    ):
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
            if checkpoint.config.get("tie_word_embeddings") is False:  # a view may have an output layer of its own
                part.tie_word_embeddings = False
        with torch.device("meta"):
            model = _auto_class(config).from_config(config, trust_remote_code=checkpoint.trusted)
    return Blueprint(checkpoint, config, dtype, type(model), vectors)


def _auto_class(config: PreTrainedConfig) -> Any:
    """What builds the model: one that reads images too is taken whole, and runs on text alone."""
    import transformers

    images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM


def open_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The configuration that lies with a checkpoint, or that its GGUF file tells.

    Raises:
        UsageError: the model needs the code that it brings, and is not trusted.
        CheckpointError: there is none, or `transformers` cannot use it.
    """
    from transformers import AutoConfig

    root, told = checkpoint.root, (alone(checkpoint) or checkpoint.view.left is not None) and checkpoint.config
    if not told and not (root / "config.json").exists():
        raise CheckpointError(
            f"{root} has no config.json, which names the model's architecture; put the original's there"
        )
    with silent_transformers(), _own_code(checkpoint), refusals(f"{root} is no causal language model"):
        config: PreTrainedConfig
        if told:
            require_told(told, checkpoint.path)
            config = AutoConfig.for_model(**told)
        else:
            config = AutoConfig.from_pretrained(root, trust_remote_code=checkpoint.trusted, local_files_only=True)
    return config


def open_generation(checkpoint: Checkpoint) -> GenerationConfig | None:
    """How a checkpoint wants texts to be continued; None where no file beside it says so, and its model's is right.

    Raises:
        CheckpointError: `generation_config.json`, or what `config.json` says of it, is damaged.
    """
    from transformers import GenerationConfig

    root, config = checkpoint.root, "config.json"
    name = next((name for name in ("generation_config.json", config) if (root / name).exists()), None)
    if name is None:
        return None
    for key, told in read_json(root / name).items():
        tokens = told if isinstance(told, list) else [told]
        if key.endswith("_token_id") and not all(isinstance(token, int | None) for token in tokens):
            raise CheckpointError(f"{root / name} has {show(told)} as {key}, where the number of a token should be")
    with silent_transformers(), refusals(f"{root / name} says nothing usable of how texts go on"):
        told_by_model: dict[str, Any] = {"_from_model_config": True} if name == config else {}
        return GenerationConfig.from_pretrained(root, name, local_files_only=True, **told_by_model)


def open_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a checkpoint.

    Raises:
        UsageError: it needs the code that it brings, and is not trusted.
        CheckpointError: there is none, or it cannot be used.
    """
    root = checkpoint.root
    with silent_transformers(), _own_code(checkpoint), refusals(f"{root} has no usable tokenizer"):
        if alone(checkpoint, "tokenizer_config.json"):
            return _told_tokenizer(tokenizer_documents(read_gguf(checkpoint.shards[0])))
        tokenizer: PreTrainedTokenizerBase = _tokenizer_class(checkpoint).from_pretrained(
            root, trust_remote_code=checkpoint.trusted, local_files_only=True
        )
    if len(tokenizer) <= _EMPTY and not (root / "tokenizer.json").exists():
        raise CheckpointError(f"{root} has no tokenizer: no file of it lies there; put it beside the weights")
    return tokenizer


def _tokenizer_class(checkpoint: Checkpoint) -> Any:
    """What opens a tokenizer; not `AutoTokenizer` where its choice is sure, as it imports all configurations for it."""
    import transformers

    beside = checkpoint.root / "tokenizer_config.json"
    told = read_json(beside) if beside.exists() else {}
    plain = told.get("tokenizer_class") in CLASSES and "auto_map" not in told
    if plain and checkpoint.config.get("model_type") in TYPES:
        return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def _told_tokenizer(documents: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of these two files."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings = {key: value for key, value in documents["tokenizer_config.json"].items() if key != "tokenizer_class"}
    made = Tokenizer.from_str(json.dumps(documents["tokenizer.json"]))
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, **settings
    )
    return tokenizer


@contextmanager
def _own_code(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of a checkpoint with code of its own, which failed without it, how to run that code."""
    try:
        yield
    except CheckpointError:
        if checkpoint.trusted or "auto_map" not in checkpoint.config:
            raise
        raise UsageError(
            f"{checkpoint.path} needs the Python code that it brings; read that code, then add --trust-remote-code"
        ) from None


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn what `transformers` raises over a file into one sentence that begins with `what`."""
    try:
        yield
    except LowbitError:
        raise
    except _REFUSALS as error:
        raise CheckpointError(f"{what}: {one_line(error)}") from error


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars and no warnings of `transformers`: what matters of them is raised as an error here."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
