"""What rounding inputs of layers, keys and values is predicted to cost, beside what it costs in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from lowbit.budget import MemoryWatch
from lowbit.cli.plan import command
from lowbit.errors import UsageError
from lowbit.stages.budgets import sensitivity
from lowbit.stages.budgets.narrow import Narrowed, kept_loss, narrow_schemes
from lowbit.stages.budgets.wide import widened
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules, load_plan, make_plan
from tests.reference.activations import fp8_groups, int8_token
from tests.reference.models import save_tiny, save_words

IDS = torch.randint(3, 96, (64, 24), generator=torch.Generator().manual_seed(1))
HELD = IDS[48:]
GENERATOR = torch.Generator().manual_seed(7)
SCHEMES: dict[str, Callable[[Tensor], Tensor]] = {
    "int8-row": int8_token,
    "int8-g4": lambda x: int8_token(x.reshape(-1, 4)).reshape(x.shape),
    "fp8-e4m3-g8": lambda x: fp8_groups(x, 8),
}
READERS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj": (),
              "mlp.gate_proj": ("mlp.up_proj",), "mlp.down_proj": ()},
    "gpt2": {"attn.c_attn": (), "attn.c_proj": (), "mlp.c_fc": (), "mlp.c_proj": ()},
}  # fmt: skip
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}


def rounding(layer: int, what: str, rounded: Callable[[Tensor], Tensor]) -> Any:
    """A cache that rounds keys or values of one layer when it is given them, by a definition of the test's own."""
    from transformers import DynamicCache  # where hqq is installed it warns, which a mark of tests alone allows

    class Rounding(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if layer_idx == layer and what == "keys":
                key_states = rounded(key_states).to(key_states)
            elif layer_idx == layer:
                value_states = rounded(value_states).to(value_states)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    return Rounding()


def true_cost(model: Any, kind: str, name: str, rounded: Callable[[Tensor], Tensor]) -> float:
    """KL of the model from itself with one thing rounded, in float64, on the windows that judge."""
    before, cache = model(HELD).logits.log_softmax(-1), None
    path, _, what = name.partition(" ")
    with ExitStack() as stack:
        if what:
            cache = rounding(int(path.rpartition(".")[2]), what, rounded)
        else:
            block = ".".join(path.split(".")[:3])
            first = path.removeprefix(f"{block}.").removesuffix(".weight")
            for each in (first, *READERS[kind][first]):
                module = model.get_submodule(f"{block}.{each}")
                hook = module.register_forward_pre_hook(lambda _, args: (rounded(args[0]).to(args[0]),))
                stack.callback(hook.remove)
        after = model(HELD, past_key_values=cache, use_cache=cache is not None).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_what_is_predicted_is_the_divergence(kind: str, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path / "m").double()
    form = {"gpt2": "gptq", "llama": "compressed-tensors"}[kind]
    source, rules = open_checkpoint(tmp_path / "m"), Rules("int8-g16", method="rtn", format=form)
    plan, schemes = make_plan(source, rules), narrow_schemes(tuple(SCHEMES))
    with (
        MemoryWatch(None).running() as watch,
        sensitivity.opened(source, plan, {}, IDS, tmp_path, None, 1, watch, narrow=schemes) as run,
    ):
        measured = sensitivity.measure(run)
    losses, found = measured.losses, measured.narrow
    inside = [f"{BLOCKS[kind]}.{n}" for n in range(2)]
    inputs = [f"{block}.{first}.weight" for block in inside for first in READERS[kind]]
    kept = [f"{block} {what}" for block in inside for what in ("keys", "values")]
    assert losses == {} and found.keys() == {*inputs, *kept}
    pairs = [(name, list(SCHEMES)[at % 3]) for at, name in enumerate(sorted(found))]
    ratios = [found[name][scheme] / true_cost(model, kind, name, SCHEMES[scheme]) for name, scheme in pairs]
    assert 0.75 < sum(ratios) / len(ratios) < 1.3, ratios
    assert min(ratios) > 0.4 and max(ratios) < 2.5, ratios


def test_what_all_keys_have_in_common_costs_nothing() -> None:
    keys = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).sign() * 0.99  # all with one error
    shifted, lone = keys.abs(), keys.abs()
    lone[:, :, 1:] = 0  # but one token is exact
    gradients = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    scheme = narrow_schemes(("int4-row",))["int4-row"]
    costs = [kept_loss([(x, gradients)], scheme, True) for x in (shifted, lone)]
    assert costs[0] < 1e-9 and 1e-6 < costs[1] < kept_loss([(lone, gradients)], scheme, False)


def test_the_sum_is_said_and_where_most_of_it_is() -> None:
    losses = {f"model.layers.{n} keys": {"int8-row": 0.001 * n} for n in range(12)}
    losses |= {f"model.layers.{n}.mlp.experts.{m}.w1.weight": {"int8-row": 0.5} for n in range(2) for m in range(3)}
    lines = list(Narrowed(losses).lines())
    assert len(lines) == 3
    assert lines[1].startswith("  model.layers.* keys in int8-row ")
    assert lines[1].endswith(" 0.066, most in 11 (0.011), 10 (0.01), 9 (0.009)")
    assert lines[2].startswith("  input of model.layers.*.mlp.experts.*.w1 in int8-row  3, most in 0.0 (0.5), ")


def test_the_fewest_weights_read_wide_inputs(tmp_path: Path) -> None:
    """Beside all sets of inputs; those of down_proj are joined, as a runtime might."""
    save_tiny("llama", tmp_path / "m")
    source = open_checkpoint(tmp_path / "m")
    plan = make_plan(source, Rules("int8-row", method="rtn", activations="int8-row", skip=["layers.1.*o_proj"]))
    sites = {f"model.layers.{n}.{first}.weight": tuple(f"model.layers.{n}.{each}.weight" for each in (first, *others))
             for n in range(2) for first, others in READERS["llama"].items()}  # fmt: skip
    losses = dict(zip(sites, torch.rand(8, generator=GENERATOR).tolist(), strict=True))
    sizes = {first: sum(prod(source.weights[name].shape) for name in names) for first, names in sites.items()}
    inputs = [first for first in sites if "layers.1.self_attn.o_proj" not in first]  # which stays in 16 bits itself
    downs = {first for first in inputs if "down" in first}
    for most in (0.0, 0.4, 1.1, 2.0, 9.0):
        sets = [set(each) for count in range(len(inputs) + 1) for each in combinations(inputs, count)]
        fitting = [each for each in sets if len(downs - each) != 1 and sum(losses[n] for n in {*inputs} - each) <= most]
        best = min(sum(sizes[name] for name in each) for each in fitting)
        found, told = widened(plan, "int8-row", losses, sites, most, lambda name: "d" if "down" in name else name)
        assert sum(sizes[name] for name in told.wide) == best and told.cost <= most and set(told.wide) in fitting
        wide = {name for first in told.wide for name in sites[first]}
        for entry, before in zip(found.entries, plan.entries, strict=True):
            assert entry.weight.scheme == before.weight.scheme
            assert (entry.weight.activations != before.weight.activations) == (entry.weight.name in wide)
        assert f"{7 - len(told.wide)} of 7 are rounded" in next(told.lines())
        (tmp_path / "plan.json").write_text(found.to_json())
        assert load_plan(tmp_path / "plan.json", source) == found


@pytest.mark.parametrize("name", ["q4_k", "int4-64x64", "nf4-dq", "int4-g32-fzero", "int8-asdf", "vq"])
def test_what_no_token_is_rounded_to_is_one_sentence(name: str) -> None:
    with pytest.raises(UsageError):
        narrow_schemes((name,))


def test_it_is_shown_without_a_budget_saved_and_taken_from_the_file(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    text, saved = save_words(tmp_path / "m"), tmp_path / "s.json"
    words = [str(tmp_path / "m"), "--method", "rtn", "--calibration", str(text), "--samples", "8"]
    words += ["--sequence-length", "24", "--sensitivity", str(saved), "--json", "--out", str(tmp_path / "plan.json")]
    budget = ["--bpw", "10", "--schemes", "int4-g8,int8-g8", "--check", "1", "--leave-out"]
    within = ["--activations", "int8-row", "--activations-within", "0"]
    runs = [["int8-g8", "--scheme", "int8-g16", *within], ["int8-g8", "--scheme", "int4-g16"]]
    runs += [["int4-g8,int8-g8", *budget]]
    first, again, more = (CliRunner().invoke(command, [*words, "--narrow", *each]) for each in runs)
    assert [each.exit_code for each in (first, again, more)] == [0, 0, 0], (first, again, more)
    assert "memory: at most" in first.stderr and "memory: at most" not in again.stderr
    told = [line for line in first.stderr.splitlines() if " in int8-g8" in line]
    assert len(told) == 6 and all(line in again.stderr and line in more.stderr for line in told)
    assert more.stderr.count(" in int4-g8") == 6 and "decisions measured, beside the rest" in more.stderr
    assert more.stderr.count("forward: 0%") <= 1 and more.stderr.count("forward: 100%") == 1  # for both measurements
    wide = "inputs: 0 of 8 are rounded to int8-row, predicted to cost 0 nats per token of 0; 8 stay wide"
    assert wide in first.stderr and '"activations": ' not in first.stdout and "inputs: " not in again.stderr
    data = json.loads(saved.read_text())
    assert {names[0]: len(names) for names in data["readers"].values()} == {
        f"model.layers.{n}.{first}.weight": 1 + len(others)
        for n in range(2)
        for first, others in READERS["llama"].items()
    }
    assert all(row.keys() - {"int8-row"} == {"int4-g8", "int8-g8"} for row in data["narrow"].values())
    assert all(row["int4-g8"] > 10 * row["int8-g8"] for row in data["narrow"].values())
