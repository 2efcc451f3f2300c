"""Low-rank terms in a calibrated run, against plain modules that compute with the codes and the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from lowbit.budget import MemoryWatch
from lowbit.corrections import LowRank
from lowbit.errors import UsageError
from lowbit.stages._adapter import Terms, read_adapter
from lowbit.stages._model import open_blueprint
from lowbit.stages.calibrate import calibrate, prepare
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Calibration, Rules, as_planned, make_plan
from lowbit.stages.quantize import estimate_memory, quantize
from lowbit.stages.write import Record, open_output
from tests.reference.activations import int8_token
from tests.reference.models import save_tiny

IDS = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(1))
Rounding = Callable[[Tensor], Tensor]


def finished(
    folder: Path, method: str, kind: str = "llama", **settings: Any
) -> tuple[Any, Checkpoint, dict[str, LowRank], dict[str, Record]]:
    """A tiny model; its quantized checkpoint, the terms of its adapter, and what the journal says."""
    model = save_tiny(kind, folder / "model")
    source = open_checkpoint(folder / "model")
    stored = ("int4-g16", method, "gptq") if kind == "gpt2" else ("int4-g8", method, "compressed-tensors")
    plan = make_plan(source, Rules(*stored, calibration=Calibration(("text",), dtype="float32"), **settings))
    source = as_planned(source, plan)
    ready = prepare(source, plan, IDS, None, 1)
    with open_output(folder / "out", source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
        quantize(source, ready.plan, output, estimate_memory(ready.plan, None, 1), MemoryWatch(None))
        output.finish(source)
        records = dict(output.records)
    adapter = Terms(folder / "out").finish("base")
    assert adapter is not None
    return model, open_checkpoint(folder / "out"), read_adapter(adapter.path), records


@final
class Layer(nn.Module):
    """`Q before(x) + B (A beside(x))`."""

    def __init__(self, codes: Tensor, term: LowRank | None, before: Rounding, beside: Rounding) -> None:
        super().__init__()
        self.codes, self.before, self.beside = codes, before, beside
        self.branch = term[1] @ term[0] if term else torch.zeros_like(codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.before(x).float() @ self.codes.T + self.beside(x).float() @ self.branch.T


def replaced(model: Any, written: Checkpoint, terms: Mapping[str, LowRank], before: Rounding, beside: Rounding) -> None:
    """Let a float model compute with codes and terms wherever a weight is quantized, and with what was kept elsewhere.

    Transforms fold into what is kept.
    """
    for name, weight in written.weights.items():
        path = name.removesuffix(".weight")
        if weight.scheme is None:
            model.get_parameter(name).copy_(written.tensor(name))
        else:
            model.set_submodule(path, Layer(written.dequantized(name), terms.get(name), before, beside))


def last_hidden(model: Any) -> Tensor:
    found: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _, inputs, out: found.append(out))
    model(input_ids=IDS, use_cache=False)
    return found[0]


def gap(found: Tensor, wanted: Tensor) -> float:
    """Of the median token: a rounding that falls the other way, for the order of a sum, changes some tokens much."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


CASES: dict[str, tuple[str, dict[str, Any], Rounding]] = {
    "fixed": ("gptq+lqer+eora", {"options": {"lqer.rank": 2, "eora.rank": 3}}, lambda x: x),
    "learned": ("autoround+eora", {"options": {"iterations": 8, "eora.rank": 3}}, lambda x: x),
    "budget": ("gptq+eora", {"options": {"eora.budget": 2.0}}, lambda x: x),
    "before": ("gptq+svdquant+eora", {"options": {"svdquant.rank": 4, "eora.rank": 2}}, lambda x: x),
    "rounded": ("smoothquant+rtn+svdquant", {"options": {"svdquant.rank": 8}}, int8_token),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_and_evaluation_compute_with_codes_and_terms(case: str, tmp_path: Path) -> None:
    method, settings, rounding = CASES[case]
    settings = {**settings, **({"activations": "int8-row"} if case == "rounded" else {})}
    model, written, terms, _ = finished(tmp_path, method, **settings)
    with torch.no_grad():
        replaced(model, written, terms, rounding, lambda x: x)
        hidden = last_hidden(model)
        path, size = str(tmp_path / "out/.lowbit/hidden/quantized-2.bin"), hidden.numel()
        seen = torch.from_file(path, size=size, dtype=torch.float32).view_as(hidden)
        logits = model(input_ids=IDS, use_cache=False).logits
        blueprint = open_blueprint(replace(written, terms=terms), torch.float32)
        scored = blueprint.resident()(input_ids=IDS, use_cache=False).logits
        # an input on the edge between two integers falls to the other side where sums are taken in another order
        near = 1e-4 if case == "rounded" else 1e-5
        assert gap(seen, hidden) < near and gap(scored, logits) < near
        replaced(model, written, {}, rounding, rounding)
        assert gap(seen, last_hidden(model)) > 0.01, "the terms matter"
        if case == "rounded":
            replaced(model, written, terms, rounding, rounding)
            assert gap(seen, last_hidden(model)) > 1e-3, "they read inputs that are not rounded"


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "mixtral", "qwen3_moe"])
def test_merged_stacked_and_transposed_weights_get_their_own_terms(kind: str, tmp_path: Path) -> None:
    """Evaluation adds each term to its weight before the model merges them; calibration has them beside the product."""
    _, written, terms, _ = finished(tmp_path, "rtn+svdquant+eora", kind, options={"svdquant.rank": 2, "eora.rank": 3})
    assert terms.keys() == {name for name, weight in written.weights.items() if weight.scheme}
    blueprint = open_blueprint(replace(written, terms=terms), torch.float32)
    model, found = blueprint.resident(), list[Tensor]()
    last = model.get_submodule(list(blueprint.blocks)[-1])
    last.register_forward_hook(lambda _, inputs, out: found.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    path = str(tmp_path / "out/.lowbit/hidden/quantized-2.bin")
    seen = torch.from_file(path, size=found[0].numel(), dtype=torch.float32).view_as(found[0])
    assert gap(seen, found[0]) < 1e-5


def test_what_comes_before_the_codes_is_counted_with_them(tmp_path: Path) -> None:
    """The error in the report is that of the sum; the codes alone are far from the weight."""
    _, written, terms, records = finished(tmp_path, "rtn+svdquant", options={"svdquant.rank": 6})
    source = open_checkpoint(tmp_path / "model")
    assert terms
    for name, (down, up) in terms.items():
        weight = source.tensor(name).double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close((up @ down).double(), left[:, :6] * values[:6] @ right[:6], atol=2e-2, rtol=0)
        error = (written.dequantized(name) + up @ down - weight).square().sum() / weight.square().sum()
        assert records[name].facts["relative_error"] == pytest.approx(float(error), rel=1e-4)
        assert error < 0.02


@pytest.mark.parametrize("budget", [0.6, 2.0])
def test_a_budget_is_kept_in_every_block_and_spent(budget: float, tmp_path: Path) -> None:
    _, written, terms, _ = finished(tmp_path, "rtn+eora", options={"eora.budget": budget})
    for block in ("layers.0.", "layers.1."):
        shapes = {name: weight.shape for name, weight in written.weights.items() if weight.scheme and block in name}
        cost = {name: 16 * sum(shape) for name, shape in shapes.items()}
        allowed = budget * sum(rows * cols for rows, cols in shapes.values())
        spent = sum(cost[name] * len(terms[name][0]) for name in shapes if name in terms)
        assert allowed - max(cost.values()) < spent <= allowed
    ranks = [len(terms[name][0]) if name in terms else 0 for name in written.weights if written.weights[name].scheme]
    assert len(set(ranks)) > 1


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("rtn+svdquant", {"svdquant.budget": 0.5}, "before the codes"),
        ("rtn+lqer+eora", {"lqer.budget": 0.5}, "corrections follow lqer"),
        ("autoround+svdquant", {}, "weights of a block together"),
    ],
)
def test_what_a_recipe_cannot_do_is_said(method: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Rules("int4-g8", method, options=options).recipe()
