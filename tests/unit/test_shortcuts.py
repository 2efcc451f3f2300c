"""Shortcuts: which modules end in a layer, and that a block that takes them computes what it computes without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.stages._attention import Memory, Remembered
from lowbit.stages._blocks import Call, Entrance, LiveBlock
from lowbit.stages._model import open_blueprint
from lowbit.stages._observe import Observer
from lowbit.stages._products import Product
from lowbit.stages._shortcuts import End, ends_of, with_shortcuts
from lowbit.stages._sites import Found, find_steps
from lowbit.stages.checkpoint import open_checkpoint
from tests.reference.models import SETTINGS, STACKED, save_tiny

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(5))
BATCH, OTHER = slice(0, 3), slice(3, 6)
CLASSES = SETTINGS | STACKED
FOUND = {
    "llama": {"self_attn": End("self_attn.o_proj", 1), "mlp": End("mlp.down_proj", None)},
    "gpt2": {"attn": End("attn.c_proj", 1), "mlp": End("mlp.c_proj", None)},
    "gpt_neox": {"attention": End("attention.dense", 1), "mlp": End("mlp.dense_4h_to_h", None)},
    "opt": {"self_attn": End("self_attn.out_proj", 1)},  # its block adds to what the layer after the MLP makes
    "bloom": {},  # its modules add the residual stream themselves
    "gemma2": {"mlp": End("mlp.down_proj", None)},  # its attention gives its weights too
    "mixtral": {"self_attn": End("self_attn.o_proj", 1)},
    "qwen2_moe": {
        "self_attn": End("self_attn.o_proj", 1), "mlp.shared_expert": End("mlp.shared_expert.down_proj", None),
    },
    "mamba": {"mixer": End("mixer.out_proj", None)},
}  # fmt: skip


def first_block(kind: str, folder: Path) -> tuple[LiveBlock, Call, Tensor]:
    """With how its model calls it, and what reaches it."""
    save_tiny(kind, folder / "model")
    blueprint = open_blueprint(open_checkpoint(folder / "model"), torch.float32)
    entrance, path = Entrance(blueprint, torch.device("cpu")), next(iter(blueprint.blocks))
    names = [n for n in blueprint.blocks[path] if len(blueprint.checkpoint.weights[n].shape) == 2]
    with torch.no_grad():
        return LiveBlock(blueprint, path, names, entrance.device), entrance.calls(IDS)[path], entrance.hidden(IDS)


@pytest.mark.parametrize("kind", FOUND)
def test_modules_that_end_in_a_layer_are_found(kind: str, tmp_path: Path) -> None:
    live, call, hidden = first_block(kind, tmp_path)
    with torch.no_grad(), ends_of(live.module) as ends:
        live.run(call, hidden)
    assert ends == FOUND[kind]


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_a_block_that_is_quantized_step_by_step_computes_the_same(kind: str, tmp_path: Path) -> None:
    live, call, hidden = first_block(kind, tmp_path)
    memory = Memory(tmp_path / "known", 2 * len(IDS))
    with ends_of(live.module) as live.ends:
        steps = find_steps(live, lambda watch: live.run(call, hidden, watch=watch))
    for step in steps:
        seen, plain = (Observer(step.sites, frozenset()) for _ in range(2))
        with suppress(Found):
            live.run(
                call,
                hidden,
                watch=seen,
                recall=Remembered(memory, "quantized", BATCH, partial(getattr, seen, "before")),
            )
        with suppress(Found):
            live.run(call, hidden, watch=plain)
        assert plain.rows.keys() == seen.rows.keys()
        assert all(torch.equal(seen.rows[site], rows) for site, rows in plain.rows.items())
        for name in step.names:
            live.weight(name).mul_(0.75)
    wanted = live.run(call, hidden)
    products: list[str] = []

    def count(product: Product) -> None:
        products.extend(product.names)

    found = live.run(call, hidden, watch=count, recall=Remembered(memory, "quantized", BATCH, lambda: False))
    assert torch.equal(found, wanted)
    layers = {end.layer for end in live.ends.values()}
    skipped = [n for n in live.places if any(f".{path}." in n for path in live.ends)]
    left = [name for name in skipped if name in products]
    assert len(left) == len(layers) and all(any(layer in name for layer in layers) for name in left)


@torch.no_grad()
def test_what_is_known_is_taken_of_its_own_batch_and_until_it_is_forgotten(tmp_path: Path) -> None:
    live, call, hidden = first_block("llama", tmp_path)
    memory = Memory(tmp_path / "known", 2 * len(IDS))
    with ends_of(live.module) as live.ends:
        live.run(call, hidden)
    for batch, states in ((BATCH, hidden), (OTHER, hidden * 2)):
        live.run(call, states, recall=Remembered(memory, "quantized", batch, lambda: True))
    for batch, states in ((BATCH, hidden), (OTHER, hidden * 2)):
        assert torch.equal(
            live.run(call, states, recall=Remembered(memory, "quantized", batch, lambda: False)), live.run(call, states)
        )
    live.tensor("input_layernorm.weight").mul_(2)
    stale = live.run(call, hidden, recall=Remembered(memory, "quantized", BATCH, lambda: False))
    memory.forget()
    fresh = live.run(call, hidden, recall=Remembered(memory, "quantized", BATCH, lambda: True))
    assert torch.equal(fresh, live.run(call, hidden)) and not torch.equal(fresh, stale)
    assert torch.equal(live.run(call, hidden, recall=Remembered(memory, "quantized", BATCH, lambda: False)), fresh)
    files = sorted((tmp_path / "known").iterdir())  # of the two modules; attention is inside of one
    assert [file.name for file in files] == ["quantized-mlp-576-4", "quantized-self_attn-384-4"]
    sizes = [2 * IDS.numel() * 48 * 4, 2 * IDS.numel() * 32 * 4]
    assert [file.stat().st_size for file in files] == sizes
    assert all(file.stat().st_blocks * 512 >= size for file, size in zip(files, sizes, strict=True))  # no holes


def test_a_place_may_be_of_another_size_in_another_block(tmp_path: Path) -> None:
    memory = Memory(tmp_path, 6)
    for width in (5, 3, 5):
        rows = torch.randn(3, 4, width)
        assert torch.equal(memory.keep("quantized-mlp", OTHER, rows), rows)
        found = memory.get("quantized-mlp", OTHER)
        assert found is not None and torch.equal(found, rows) and memory.get("quantized-mlp", BATCH) is None
        memory.forget()
        assert memory.get("quantized-mlp", OTHER) is None


@pytest.mark.parametrize("final", [True, False])
@torch.no_grad()
def test_nothing_is_kept_that_will_change(final: bool, tmp_path: Path) -> None:
    live, call, hidden = first_block("llama", tmp_path)
    memory = Memory(tmp_path / "known", 2 * len(IDS))
    with ends_of(live.module) as live.ends:
        live.run(call, hidden)
    live.run(call, hidden, recall=Remembered(memory, "quantized", BATCH, lambda: final))
    known = [memory.get(f"quantized-{path}", BATCH) is not None for path in live.ends]
    assert known == [final, final]


class _Part(nn.Module):
    """Two layers, and what is done with the second one's output."""

    def __init__(self, end: Callable[[Tensor], Any], first: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4) if first else nn.Identity()
        self.last, self._end = nn.Linear(4, 4), end

    def forward(self, x: Tensor, memo: dict[str, Tensor] | None = None) -> Any:
        return self._end(self.last(self.first(x)))


class _Block(nn.Module):
    def __init__(self, part: nn.Module, times: int = 1, memo: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.part, self._times, self._memo = part, times, memo

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self._times):
            made = self.part(x, memo=self._memo)
            x = x + (made[0] if isinstance(made, tuple) else made)
        return x


def test_what_a_block_asks_its_module_is_answered() -> None:
    part = _Part(lambda y: y)
    (shortcut,) = with_shortcuts(_Block(part), {"part": End("part.last", None)})
    assert shortcut.first is part.first and shortcut.training
    with pytest.raises(AttributeError, match="second"):
        _ = shortcut.second


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (_Block(_Part(lambda y: y)), True),
        (_Block(_Part(lambda y: (y, None, None))), True),
        (_Block(_Part(lambda y: y.view(y.shape))), True),
        (_Block(_Part(lambda y: y.add_(1))), False),  # the same memory, other values
        (_Block(_Part(lambda y: y + 0)), False),
        (_Block(_Part(lambda y: y.T)), False),
        (_Block(_Part(lambda y: (y, y.sum()))), False),
        (_Block(_Part(lambda y: y, first=False)), False),  # there is nothing to leave out
        (_Block(_Part(lambda y: y), times=2), False),
        (_Block(_Part(lambda y: y), memo={}), False),  # it may hand on something else
    ],
)
def test_only_modules_that_are_nothing_but_their_last_layer_are_found(block: nn.Module, found: bool) -> None:
    with torch.no_grad(), ends_of(block) as ends:
        block(torch.randn(4, 4))
    assert ends.keys() == ({"part"} if found else set())
