"""Running: bytes of memory that a model takes as it runs, and seconds of a token, from its configuration and shapes.

Nothing is loaded. What cannot be worked out is refused, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from lowbit.budget import format_size, format_sum
from lowbit.errors import UnsupportedError
from lowbit.stages._policy import is_expert, role_of
from lowbit.stages._told import Config
from lowbit.stages.plan import Entry, Plan

_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image)")
_WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


@final
@dataclass(frozen=True)
class Cache:
    """What a model remembers of its context.

    Attributes:
        values: numbers that are stored per token in the layers that see the whole context.
        total: numbers in all, for the context and the batch asked for.
        state: bytes that do not grow with the context, of all sequences (linear attention), kept in float32.
        windowed: layers that keep a window alone.
    """

    values: int
    total: int
    state: int
    windowed: int

    def nbytes(self, bits: int | float) -> int:
        """Bytes, where a number takes `bits` with its share of the scales."""
        return round(self.total * bits / 8) + self.state


def cache_of(config: Config, context: int, batch: int, latent: bool) -> Cache:
    """The cache of `batch` sequences of `context` tokens each.

    Two numbers (key and value) per head of keys, per element of a head, per layer and token; of multi-head latent
    attention (DeepSeek, arXiv 2405.04434) the latent and the rotary part where `latent`, else what is made of it.
    Layers with a window keep that many tokens.

    Raises:
        UnsupportedError: a layer of a kind whose memory is not worked out here.
    """
    text = config.get_text_config()
    layers = int(_told(text, "num_hidden_layers"))
    kinds = getattr(text, "layer_types", None) or [_kind(text)] * layers
    values, total, state, windowed = 0, 0, 0, 0
    for kind in kinds[:layers]:
        if kind == "linear_attention":
            state += batch * _linear_state(text)
            continue
        if kind not in ("full_attention", *_WINDOWED):
            raise UnsupportedError(f"the cache of a layer of kind {kind!r} ({text.model_type}) is not worked out here")
        width = _width(text, latent)
        window = getattr(text, _WINDOWED[kind], None) if kind in _WINDOWED else None
        windowed += bool(window)
        values += 0 if window else width
        total += batch * width * (min(context, int(window)) if window else context)
    return Cache(values, total, state, windowed)


def _told(text: Config, name: str) -> Any:
    value = getattr(text, name, None)
    if value is None:
        raise UnsupportedError(f"a configuration of {text.model_type} has no {name}: its cache is not worked out here")
    return value


def _kind(text: Config) -> str:
    """What all layers are, where the configuration does not tell them apart."""
    uses = getattr(text, "use_sliding_window", True)
    return "sliding_attention" if getattr(text, "sliding_window", None) and uses else "full_attention"


def _width(text: Config, latent: bool) -> int:
    """Numbers that one layer stores of one token."""
    heads = int(_told(text, "num_attention_heads"))
    rank = getattr(text, "kv_lora_rank", None)
    if rank:
        rope, plain, value = (int(_told(text, name)) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        return int(rank) + rope if latent else heads * (rope + plain + value)
    size = getattr(text, "head_dim", None) or int(_told(text, "hidden_size")) // heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 2 * int(size)
    kept = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    return 2 * int(kept) * int(size)


def _linear_state(text: Config) -> int:
    """Bytes of the state of a gated delta layer (Qwen3-Next): a matrix per head, and the convolution's last inputs."""
    names = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
    key, value, keys, heads, kernel = (int(_told(text, f"linear_{name}")) for name in names)
    return 4 * (heads * key * value + (2 * keys * key + heads * value) * kernel)


def activation_bytes(config: Config, context: int, batch: int, chunk: int, value: int) -> int:
    """Bytes that are alive at once at most in one block, and of the logits: an estimate from shapes.

    Of every token in a pass of `chunk` tokens at most: the hidden state before and after its norm, and the larger of
    what attention holds (queries, keys, values, output) and what the feed-forward layer does (gate, up, their product).
    Attention's scores are taken to be made in pieces. Logits of the last token of each sequence in float32.

    Args:
        value: bytes of an activation.
    """
    text = config.get_text_config()
    hidden, heads = int(_told(text, "hidden_size")), int(_told(text, "num_attention_heads"))
    size = getattr(text, "head_dim", None) or hidden // heads
    attention = 2 * heads * int(size) + _width(text, latent=False)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    experts, used = _experts(text)
    if experts:
        inner = max(inner, used * int(getattr(text, "moe_intermediate_size", None) or inner))
    tokens = min(context * batch, max(chunk, batch))
    return tokens * value * (2 * hidden + max(attention, 3 * inner)) + 4 * batch * int(_told(text, "vocab_size"))


def _experts(text: Config) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token uses; zeros where there are none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((int(found) for name in names if (found := getattr(text, name, None))), 0)
    return count, int(getattr(text, "num_experts_per_tok", None) or getattr(text, "num_experts_per_token", 0) or 0)


def read_shares(entries: Sequence[Entry], config: Config, tokens: int = 1) -> list[float]:
    """The share of each weight that one step of decoding reads at least.

    Left out are the embedding's rows (but for a head that is tied to it), towers for images and sound, and, of a
    layer's experts, all but those that a token uses.

    Args:
        tokens: of one step, of as many sequences; they are taken to use different experts.
    """
    count, used = _experts(config.get_text_config())
    headless = not any(role_of(entry.weight.name) == "head" and not entry.tied for entry in entries)

    def share(name: str) -> float:
        if (role_of(name) == "embedding" and not headless) or _TOWERS.search(name):
            return 0.0
        return min(1.0, tokens * used / count) if count and used and is_expert(name) else 1.0

    return [share(entry.weight.name) for entry in entries]


def read_bytes(entries: Sequence[Entry], sizes: Sequence[int], config: Config) -> int:
    """Bytes of weights that one step of decoding reads at least; with more tokens it reads more (`read_shares`).

    Args:
        sizes: bytes of each entry in memory.
    """
    shares = read_shares(entries, config)
    return int(sum(size * share for size, share in zip(sizes, shares, strict=True)))


@final
@dataclass(frozen=True)
class Use:
    """One weight as it runs.

    Attributes:
        entry: what it is.
        stored: bytes in the file.
        share: of it, that a step of decoding multiplies by.
        looked: whether its rows are looked up.
    """

    entry: Entry
    stored: int
    share: float
    looked: bool


def as_stored(use: Use) -> int:
    """Bytes in memory where a runtime takes weights as they are in the file."""
    return use.stored


@final
@dataclass(frozen=True)
class Kept:
    """A type of the cache.

    Attributes:
        name: as the runtime calls it; `bits` of a number, scales included.
        scheme: of `--narrow`, which rounds nearly so.
    """

    name: str
    bits: float
    scheme: str


@final
@dataclass(frozen=True)
class Running:
    """How a result is to run.

    Attributes:
        runtime: name, of `arch/runtimes.toml`, with its facts: `chunk`, `value`, `latent`.
        context, batch: tokens of each sequence, and sequences at once.
        cache: name of the cache's type; `bits` of a number of it, scales included.
        machine: name of the hardware; empty where none is meant.
        bandwidth: bytes a second of its memory; 0 where none is meant.
        held: bytes of a weight in memory.
        product: seconds to multiply by a whole weight, measured; None where these are its bytes over the bandwidth.
        others: types of the cache that may take the place of `cache`.
    """

    runtime: str
    context: int
    batch: int
    cache: str
    bits: float
    chunk: int
    value: int
    latent: bool
    machine: str = ""
    bandwidth: float = 0.0
    held: Callable[[Use], int] = as_stored
    product: Callable[[Use], float] | None = None
    others: tuple[Kept, ...] = ()

    @property
    def ways(self) -> tuple[Running, ...]:
        """This, and the same with each other type of the cache."""
        return (self, *(replace(self, cache=each.name, bits=each.bits) for each in self.others))

    def seconds(self, use: Use) -> float:
        """Of a step of decoding that are due to this weight."""
        if not use.share:
            return 0.0
        if self.product:
            return use.share * self.product(use)
        return use.share * self.held(replace(use, looked=False)) / self.bandwidth

    def beside(self, config: Config) -> tuple[int, int]:
        """Bytes of the cache, and of what a pass works with."""
        cache = cache_of(config, self.context, self.batch, self.latent).nbytes(self.bits)
        return cache, activation_bytes(config, self.context, self.batch, self.chunk, self.value)


def uses_of(plan: Plan, config: Config, tokens: int) -> dict[str, Use]:
    """Every weight of a plan as it runs; what is tied to another is that one."""
    shares = read_shares(plan.entries, config, tokens)
    return {
        entry.weight.name: Use(entry, plan.stored_bytes(entry), share, role_of(entry.weight.name) == "embedding")
        for entry, share in zip(plan.entries, shares, strict=True)
        if not entry.tied
    }


@final
@dataclass(frozen=True)
class Forecast:
    """What a plan takes as it runs.

    Attributes:
        running: for which this holds.
        weights, cache, working: bytes of memory; `memory`: most that were asked for, or None.
        reading, remembering: seconds of one step of decoding for weights and for the cache; 0 without a bandwidth.
        latency: most seconds that were asked for, or None.
    """

    running: Running
    weights: int
    cache: int
    working: int
    reading: float
    remembering: float
    memory: int | None = None
    latency: float | None = None

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.weights + self.cache + self.working

    def lines(self) -> Iterator[str]:
        """What is said of it."""
        run = self.running
        where = f"{run.runtime}, {run.batch} x {run.context:,} tokens, cache {run.cache}"
        most = f" of {format_size(self.memory)}" if self.memory is not None else ""
        parts = {"weights": self.weights, "cache": self.cache, "working": self.working}
        yield f"memory at run time: {format_size(self.total)}{most} = {format_sum(parts)} ({where})"
        if run.bandwidth:
            seconds = self.reading + self.remembering
            most = f" of {1e3 * self.latency:.4g}" if self.latency is not None else ""
            where = "this machine" if run.machine == "this" else run.machine
            rate = "kernels measured" if run.product else f"at {run.bandwidth / 1e9:,.1f} GB/s"
            yield (
                f"one token: {1e3 * seconds:.4g} ms{most} = weights {1e3 * self.reading:.4g} + cache "
                f"{1e3 * self.remembering:.4g}; {run.batch / seconds:,.1f} tokens/s in all ({where}, {rate})"
            )


def forecast(
    plan: Plan, config: Config, running: Running, memory: int | None = None, latency: float | None = None
) -> Forecast:
    """What a plan takes as it runs, beside what was asked for."""
    cache, working = running.beside(config)
    uses = uses_of(plan, config, running.batch).values()
    reading, remembering = 0.0, 0.0
    if running.bandwidth:
        reading, remembering = float(sum(map(running.seconds, uses))), cache / running.bandwidth
    return Forecast(running, sum(map(running.held, uses)), cache, working, reading, remembering, memory, latency)
