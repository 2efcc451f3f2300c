"""The native decoder over a loaded model of the Llama family: logits token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowbit.errors import UnsupportedError
from lowbit.native import MATRICES, NORMS, Cache, Decoder, DecoderEnds, DecoderLayer, DecoderShape, Matrix
from lowbit.runtime.model import Loaded
from lowbit.runtime.panels import Packed, pack_dense
from lowbit.runtime.table import Table
from lowbit.stages.checkpoint import arch_rows

_CHUNK = 256  # tokens of a prompt that go through the blocks together
_GATES = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}  # whether it is GELU


@final
@dataclass(frozen=True)
class Facts:
    """A row of `arch/decoder.toml`, which says what each means."""

    model_types: Sequence[str]
    plus: float = 0.0
    activation: str = "hidden_act"
    fused: bool = False
    after: str = "post_attention_layernorm"
    attended: str | None = None
    fed: str | None = None
    capped: bool = False
    split: bool = False


@final
@dataclass(frozen=True, eq=False)
class Native:
    """All that decoding needs of a model.

    Attributes:
        shape: of its blocks.
        matrices: `LAYER.query` and so on (`native.MATRICES`) of every block, and `head`, which gives logits.
        vectors: `LAYER.before` and so on (`native.NORMS`), `MATRIX.bias`, `norm` (before the head), `embedding`, and
            `angles.TABLE`: turns of each pair of dimensions per position.
        windows: for each block positions that a token sees, 0 for all before it.
        angles: for each block the table that turns its heads, -1 for none.
        factors: of each table, what cosine and sine are multiplied by.
        factor: of embeddings.
        cap: of logits, or 0.
        blocks: of the embedding (`Table`).
    """

    shape: DecoderShape
    matrices: Mapping[str, Packed]
    vectors: Mapping[str, Tensor]
    windows: tuple[int, ...]
    angles: tuple[int, ...]
    factors: tuple[float, ...]
    factor: float = 1.0
    cap: float = 0.0
    blocks: str = ""


@final
class Engine:
    """A native model that reads texts."""

    def __init__(self, native: Native, threads: int | None = None) -> None:
        self.native = native
        kinds = zip(native.windows, native.angles, strict=True)
        layers = [self._layer(number, *kind) for number, kind in enumerate(kinds)]
        self._table = Table(native.vectors["embedding"], native.blocks)
        steps = torch.stack([native.vectors[f"angles.{i}"] for i in range(len(native.factors))])
        self.ends = DecoderEnds(
            self._table.opened(), native.vectors["norm"], self._matrix("head"), steps, torch.tensor(native.factors),
            native.factor,
        )  # fmt: skip
        self.decoder = Decoder(native.shape, layers, self.ends, threads or torch.get_num_threads())

    def _layer(self, number: int, window: int, angles: int) -> DecoderLayer:
        matrices: Any = {name: self._matrix(f"{number}.{name}") for name in MATRICES}
        norms: Any = {name: self.native.vectors.get(f"{number}.{name}") for name in NORMS}
        return DecoderLayer(**matrices, **norms, window=window, angles=angles)

    def _matrix(self, name: str) -> Matrix:
        return self.native.matrices[name].matrix(self.native.vectors.get(f"{name}.bias"))

    def start(self, limit: int, keep: str = "float32") -> Session:
        """A text of at most `limit` tokens, its keys and values kept as one of `native.KEEPS`."""
        return Session(self, self.decoder.cache(keep, limit))

    def read(self, new: Sequence[tuple[Session, Int64[Tensor, "_"]]]) -> Float[Tensor, "texts vocabulary"]:
        """Read more tokens of each text, at least one; the logits of the token after them."""
        self._read([(session, ids.tolist()) for session, ids in new])
        logits = self.decoder.logits()
        return logits if not self.native.cap else (logits / self.native.cap).tanh() * self.native.cap

    def likeliest(self, new: Sequence[tuple[Session, int]]) -> list[int]:
        """Read a token more of each text; the likeliest after it."""
        self._read([(session, [token]) for session, token in new])
        return self.decoder.likeliest()

    def _read(self, new: Sequence[tuple[Session, list[int]]]) -> None:
        tokens = [token for _, ids in new for token in ids]
        if not self.decoder.read(tokens, [(session.cache, len(ids)) for session, ids in new]):
            raise self._table.refusal(tokens)
        for session, ids in new:
            session.ids += ids


@final
class Session:
    """A text that a model has read so far, and what comes next.

    Attributes:
        engine: that reads it.
        ids: its tokens.
        cache: their keys and values.
    """

    def __init__(self, engine: Engine, cache: Cache) -> None:
        self.engine, self.cache = engine, cache
        self.ids: list[int] = []

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return self.cache.nbytes

    def read(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Read more tokens, at least one; the logits of the token after them."""
        for part in torch.split(ids, _CHUNK):
            logits = self.engine.read([(self, part)])[0]
        return logits

    def likeliest(self, token: int) -> int:
        """Read one more token; the likeliest after it."""
        return self.engine.likeliest([(self, token)])[0]

    def follow(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Be the text of these tokens: what it has and they have too, from the first on, is not read again."""
        whole = ids.tolist()
        pairs = zip(self.ids, whole[:-1], strict=False)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(self.ids), len(whole) - 1))
        self.cache.forget(same)
        del self.ids[same:]
        return self.read(ids[same:])


def start(loaded: Loaded, limit: int, threads: int | None = None, keep: str = "float32") -> Session:
    """A text of at most `limit` tokens.

    Raises:
        UnsupportedError: the model is of no kind whose blocks the decoder knows, with what is different.
    """
    return Engine(native_of(loaded), threads).start(limit, keep)


def native_of(loaded: Loaded) -> Native:
    """What the native decoder needs of a loaded model; layers that are not on the kernels are packed as they are.

    Raises:
        UnsupportedError: the model is of no kind whose blocks the decoder knows, with what is different.
    """
    model: Any = loaded.model
    facts = _facts(model)
    reason = next(_objections(model, facts), None)
    if reason:
        raise UnsupportedError(f"the native decoder does not run this model: {reason}")
    tables, factors = _tables(model, facts)
    config, blocks = model.config, model.model.layers
    parts = [(f"{number}.", block) for number, block in enumerate(blocks)]
    table = loaded.table or Table(_detached(model.model.embed_tokens.weight))
    matrices, vectors = {}, {"embedding": table.values}
    for start, block in parts:
        for name, module, first, count in _matrices(block, facts, config):
            matrices[start + name], bias = _packed(module).part(first, count), _bias(module)
            vectors |= {} if bias is None else {f"{start}{name}.bias": bias[first : first + count]}
        vectors |= {start + name: value for name, value in _norms(block, facts)}
    matrices["head"], head = _packed(model.lm_head), _bias(model.lm_head)
    vectors |= {"norm": _weight(model.model.norm, facts)} | ({} if head is None else {"head.bias": head})
    vectors |= {f"angles.{number}": table for number, table in enumerate(tables.values())}
    return Native(
        _shape(model, facts, 2 * len(next(iter(tables.values())))), matrices, vectors,
        windows=tuple(_window(config, number) for number in range(len(blocks))),
        angles=tuple(_table(block, config, tables, number) for number, block in enumerate(blocks)),
        factors=factors, factor=float(getattr(model.model.embed_tokens, "embed_scale", 1.0)),
        cap=getattr(config, "final_logit_softcapping", None) or 0.0, blocks=table.blocks,
    )  # fmt: skip


def _facts(model: Any) -> Facts:
    rows = [Facts(**row) for row in arch_rows("decoder")]
    kind = model.config.model_type
    found = next((row for row in rows if kind in row.model_types), None)
    if found is None:
        known = ", ".join(each for row in rows for each in row.model_types)
        raise UnsupportedError(f"the native decoder does not run this model: it is a {kind}, no {known}")
    return found


def _objections(model: Any, facts: Facts) -> Iterator[str]:
    """What is not as the decoder computes it."""
    config = model.config
    if getattr(config, facts.activation) not in _GATES:
        yield f"its feed-forward layers have {getattr(config, facts.activation)}"
    if getattr(config, "use_bidirectional_attention", None):
        yield "its tokens see those after them"
    size = _head_size(model)
    if size % 16:
        yield f"its heads are {size} wide, no multiple of 16"
    kinds = getattr(model.model.rotary_emb, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if kind in ("dynamic", "longrope"):
            yield f"its angles ({kind}) depend on the length of the text"
    if facts.fused and (config.intermediate_size % 16 or config.num_attention_heads * size % 16):
        yield "rows of its merged matrices do not end with a panel"


def _head_size(model: Any) -> int:
    return int(model.model.layers[0].self_attn.head_dim)


def _shape(model: Any, facts: Facts, turned: int) -> DecoderShape:
    config, attention = model.config, model.model.layers[0].self_attn
    return DecoderShape(
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, _head_size(model),
        config.intermediate_size, turned, config.rms_norm_eps, attention.scaling,
        (getattr(config, "attn_logit_softcapping", None) or 0.0) if facts.capped else 0.0,
        _GATES[getattr(config, facts.activation)],
    )  # fmt: skip


def _kinds(config: Any) -> list[str]:
    """What each block sees, as `transformers` calls it."""
    one = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(getattr(config, "layer_types", None) or [one] * config.num_hidden_layers)


def _window(config: Any, number: int) -> int:
    return (config.sliding_window or 0) if _kinds(config)[number] == "sliding_attention" else 0


def _tables(model: Any, facts: Facts) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """Turns of each pair of dimensions per position by kind of block (one for all: ``), and factors of the results."""
    turns = model.model.rotary_emb
    if not facts.split:
        return {"": _detached(turns.inv_freq)}, (float(turns.attention_scaling),)
    kinds = sorted(set(_kinds(model.config)))
    tables = {kind: _detached(getattr(turns, f"{kind}_inv_freq")) for kind in kinds}
    return tables, tuple(float(getattr(turns, f"{kind}_attention_scaling")) for kind in kinds)


def _table(block: Any, config: Any, tables: Mapping[str, Tensor], number: int) -> int:
    if not getattr(block.self_attn, "use_rope", True):
        return -1
    return list(tables).index("" if "" in tables else _kinds(config)[number])


def _matrices(block: Any, facts: Facts, config: Any) -> Iterator[tuple[str, Any, int, int]]:
    """Each matrix of a block: the layer that has it, its first row in it, and its rows."""
    attention, feed = block.self_attn, block.mlp
    heads = {
        "query": config.num_attention_heads,
        "key": config.num_key_value_heads,
        "value": config.num_key_value_heads,
    }
    rows = {name: count * attention.head_dim for name, count in heads.items()}
    rows |= {"gate": config.intermediate_size, "up": config.intermediate_size}
    at = {"query": 0, "key": rows["query"], "value": rows["query"] + rows["key"], "gate": 0, "up": rows["gate"]}
    for name, count in rows.items():
        owner, merged = (feed, "gate_up_proj") if name in ("gate", "up") else (attention, "qkv_proj")
        alone = f"{name}_proj" if owner is feed else f"{name[0]}_proj"
        yield name, getattr(owner, merged if facts.fused else alone), at[name] if facts.fused else 0, count
    yield "output", attention.o_proj, 0, config.hidden_size
    yield "down", feed.down_proj, 0, config.hidden_size


def _norms(block: Any, facts: Facts) -> Iterator[tuple[str, Tensor]]:
    attention = block.self_attn
    modules = {
        "before": block.input_layernorm,
        "after": getattr(block, facts.after),
        "query_norm": getattr(attention, "q_norm", None),
        "key_norm": getattr(attention, "k_norm", None),
        "attended": getattr(block, facts.attended) if facts.attended else None,
        "fed": getattr(block, facts.fed) if facts.fed else None,
    }
    yield from ((name, _weight(module, facts)) for name, module in modules.items() if module is not None)


def _weight(norm: Any, facts: Facts) -> Float[Tensor, " width"]:
    return _detached(norm.weight).float() + facts.plus


def _packed(module: Any) -> Packed:
    """That of a layer on the kernels; one that is not is packed as it is."""
    return getattr(module, "packed", None) or pack_dense(_detached(module.weight))


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else _detached(module.bias).float()


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()
