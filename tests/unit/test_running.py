"""Budgets at run time: bytes against what opens, seconds against made-up times, sentences, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from lowbit.advise import running
from lowbit.advise.hardware import find
from lowbit.api import quantize
from lowbit.cli._options import make_budget
from lowbit.cli.plan import command
from lowbit.errors import UsageError
from lowbit.runtime import costs
from lowbit.runtime.model import open_model
from lowbit.schemes import parse
from lowbit.stages.budgets.allocate import Budget, Problem, make_problem, undecided
from lowbit.stages.budgets.sensitivity import Sensitivity, conditions
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules, make_offers, make_plan
from lowbit.stages.running import Kept, Running, Use, forecast, uses_of
from lowbit.stages.samples import read_samples
from tests.reference.models import save_tiny

SCHEMES = ("int4-g16-f16", "int8-g16-f16")
RUN = Running("vllm", 40, 3, "fp8", 8.0, 512, 2, True, "card", 1e6)
# Of `save_tiny`: two layers, keys and values of two heads of 8, one byte each, 40 tokens of 3 sequences.
CACHE = 2 * 2 * 2 * 8 * 40 * 3


def made(path: Path, schemes: tuple[str, ...] = SCHEMES, fused: bool = False) -> Problem:
    """Losses that quarter with each bit, each weight with a factor of its own."""
    save_tiny("llama", path, torch.float16)
    source, rules = open_checkpoint(path), Rules(method="rtn")
    offers = make_offers(source, rules, schemes)
    losses = {
        name: {s: (at + 1) * 4.0 ** -parse(s).grid.bits for s in row} for at, (name, row) in enumerate(offers.items())
    }
    return make_problem(source, rules, offers, losses, fused, undecided(source, rules, offers))


def bytes_of(weights: Mapping[str, Any]) -> int:
    """Of a file's weights: codes, a float16 for 16 of them, two int64 for the shape; two bytes of what stays."""
    return sum(
        w.shape[0] * w.shape[1] * w.scheme.grid.bits // 8 + 2 * w.shape[0] * w.shape[1] // 16 + 16
        if w.scheme else 2 * int(torch.tensor(w.shape).prod())
        for w in weights.values()
    )  # fmt: skip


def test_memory_at_run_time_is_a_sum_made_by_hand_and_is_kept(tmp_path: Path) -> None:
    parts = made(tmp_path / "m")
    least = parts.within(Budget(memory=10**9, running=RUN)).forecast
    assert least is not None
    # 120 tokens in a pass: the hidden state twice, gate, up and their product in 2 bytes; logits of 3 in 4.
    working = 120 * 2 * (2 * 32 + 3 * 48) + 4 * 3 * 96
    assert (least.cache, least.working) == (CACHE, working)
    budgets = [least.total - cut for cut in (0, 1, 1000, 4000)]
    found = [parts.within(Budget(memory=budget, running=RUN)) for budget in budgets]
    for budget, each in zip(budgets, found, strict=True):
        assert each.forecast and each.forecast.total <= budget
        weights = {entry.weight.name: entry.weight for entry in each.plan.entries}
        assert each.forecast.weights == bytes_of(weights)
    assert found[0].loss < found[1].loss < found[2].loss < found[3].loss
    smallest = bytes_of({entry.weight.name: entry.weight for entry in parts.smallest().plan.entries})
    parts.within(Budget(memory=smallest + CACHE + working, running=RUN))
    with pytest.raises(UsageError, match=r"needs .* = weights .* \+ cache 7.5 KiB \+ working"):
        parts.within(Budget(memory=smallest + CACHE + working - 1, running=RUN))


def test_a_token_is_as_fast_as_asked_and_what_it_reads_counts(tmp_path: Path) -> None:
    parts = made(tmp_path / "m")
    bits = {4: 0.001, 8: 0.004}

    def took(use: Use) -> float:
        return bits[use.entry.weight.scheme.grid.bits] if use.entry.weight.scheme else 0.0

    timed = replace(RUN, product=took)
    kept = CACHE / 1e6
    for many in (0, 3, 9, 14):
        asked = 0.001 * 14 + 0.003 * many + kept + 1e-9
        found = parts.within(Budget(latency=asked, running=timed))
        eights = [entry for entry in found.plan.entries if entry.weight.scheme and entry.weight.scheme.grid.bits == 8]
        assert len(eights) == many
        assert found.forecast and found.forecast.reading + found.forecast.remembering <= asked
        assert f"of {1e3 * asked:.4g}" in list(found.forecast.lines())[1]
    with pytest.raises(
        UsageError,
        match=r"^--latency: .* a token takes 21.68ms on card \(46.13 a second\), weights 14ms and cache 7.68ms",
    ):
        parts.within(Budget(latency=0.001 * 14 + kept - 1e-6, running=timed))
    plain = parts.within(Budget(latency=1.0, running=RUN))  # bytes over the bandwidth, without the embedding's rows
    weights = {e.weight.name: e.weight for e in plain.plan.entries if "embed" not in e.weight.name}
    assert plain.forecast and plain.forecast.reading == pytest.approx(bytes_of(weights) / 1e6)


def test_the_cache_gets_what_is_best_beside_the_weights(tmp_path: Path) -> None:
    """Beside all combinations of schemes and types, their bytes worked out by hand."""
    parts = made(tmp_path / "m", fused=True)
    types = {"f16": (16.0, 0.0), "q8_0": (8.5, 0.03), "q4_0": (4.5, 0.2)}
    others = tuple(Kept(name, bits, name) for name, (bits, _) in types.items() if name != "f16")
    run = replace(RUN, cache="f16", bits=16.0, others=others)
    parts = replace(parts, kept={name: loss for name, (_, loss) in types.items()})
    plain = {entry.weight.name: entry.weight for entry in parts.undecided.entries}
    decided = {name for group in parts.groups for name in group}
    working = 120 * 2 * (2 * 32 + 3 * 48) + 4 * 3 * 96
    rest = bytes_of({name: weight for name, weight in plain.items() if name not in decided})
    read = rest - bytes_of({name: weight for name, weight in plain.items() if "embed" in name})
    found: list[tuple[float, float, float]] = []  # loss, memory, bytes that a token reads
    for schemes in product(SCHEMES, repeat=len(parts.groups)):
        pairs = [(name, scheme) for group, scheme in zip(parts.groups, schemes, strict=True) for name in group]
        held = bytes_of({name: replace(plain[name], scheme=parse(scheme)) for name, scheme in pairs})
        loss = sum(parts.losses[name][scheme] for name, scheme in pairs)
        for bits, more in types.values():
            cache = CACHE * bits / 8
            found.append((loss + more, held + rest + cache + working, held + read + cache))
    chosen = set[str]()
    for share in (0.02, 0.2, 0.5, 0.99):
        memory, latency = (min(x) + share * (max(x) - min(x)) for x in list(zip(*found, strict=True))[1:])
        for budget in (Budget(memory=int(memory), running=run), Budget(latency=latency / 1e6, running=run)):
            best = min(row[0] for row in found if row[1 if budget.memory else 2] <= (budget.memory or latency))
            got = parts.within(budget)
            assert best <= got.loss * (1 + 1e-9) <= 1.001 * best
            assert got.forecast and got.forecast.total <= (budget.memory or 10**9)
            assert got.forecast.running.cache == next(iter(got.caches))
            chosen.add(got.forecast.running.cache)
    assert chosen == set(types)
    assert "cache: " in list(got.lines())[1] and "not " in list(got.lines())[1]


def test_what_a_plan_uses_of_its_budgets_is_at_most_all_of_each(tmp_path: Path) -> None:
    """By these shares `--check` finds the decisions that were nearest to another, and both budgets count alike."""
    parts = made(tmp_path / "m")
    budget = Budget(bits=7.0, latency=0.1, running=RUN)
    chosen, shares = parts.within(budget).chosen, parts._use(budget)
    picked = [row.index(chosen[group[0]]) for group, row in zip(parts.groups, parts.choices, strict=True)]
    used = sum(row[at] for row, at in zip(shares, picked, strict=True))
    assert 1 < used <= 2


def test_two_budgets_hold_at_once(tmp_path: Path) -> None:
    parts = made(tmp_path / "m", (*SCHEMES, "int3-g16-f16"))

    def took(use: Use) -> float:  # three bits are slow in the feed-forward layers
        return 0.002 if "int3" in str(use.entry.weight.scheme) and "mlp" in use.entry.weight.name else 0.001

    slow, least = replace(RUN, product=took), parts.smallest()
    count = sum(1 for use in uses_of(least.plan, parts._config, 3).values() if use.share)
    asked = 0.001 * (count + 1) + CACHE / 1e6 + 1e-9
    memory = forecast(least.plan, parts._config, RUN).total + 1400
    for budget in (Budget(bits=4.6), Budget(size=least.size + 1400), Budget(memory=memory)):
        alone = parts.within(replace(budget, running=slow))
        found = parts.within(replace(budget, latency=asked, running=slow))
        assert alone.forecast and found.forecast
        assert alone.forecast.reading > found.forecast.reading and found.loss > alone.loss
        assert found.forecast.reading + found.forecast.remembering <= asked
        assert found.plan.bits_per_weight()[0] <= (budget.bits or 99) and found.size <= (budget.size or 10**9)
        assert budget.memory is None or found.forecast.total <= budget.memory


@pytest.mark.parametrize("scheme", ["int4-g16", "int3-g32-asym", "int8-g8"])
def test_our_own_runtime_holds_what_is_said(scheme: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m", torch.float16)
    quantize(tmp_path / "m", tmp_path / "q", scheme=scheme, method="rtn", skip=["k_proj", "down_proj"])
    found = open_model(tmp_path / "q")
    model: Any = found.model
    held = round(model.get_memory_footprint(return_buffers=False))
    plan = make_plan(open_checkpoint(tmp_path / "m"), Rules(scheme, "rtn", skip=["k_proj", "down_proj"]))
    said = sum(map(costs.held_bytes, uses_of(plan, found.model.config, 1).values()))
    assert said == held


def test_kernels_are_timed_once_a_kind_and_in_proportion_to_rows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(costs, "_ALL", costs._ONE)
    monkeypatch.setattr(costs, "_SPENT", 0.01)
    parts = made(tmp_path / "m", ("int4-g16", "int8-g8"))  # of 8 no kernel takes
    uses = uses_of(parts.smallest().plan, parts._config, 1)
    one = uses["model.layers.0.mlp.up_proj.weight"]
    timer = costs.product_timer(1, 1)
    first = timer(one)
    assert 1e-9 < first < 0.1 and timer(one) == first
    wide = replace(one.entry, weight=replace(one.entry.weight, shape=(96, 32)))
    assert timer(replace(one, entry=wide)) == pytest.approx(2 * first)
    assert timer(uses["model.norm.weight"]) == 0.0
    offered = parts.offers[one.entry.weight.name]["int8-g8"]
    assert timer(replace(one, entry=offered)) > 0 and timer(uses["model.embed_tokens.weight"]) > 0


OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("bits", "size", "memory", "kl", "perplexity", "latency", "rate", "sensitivity", "text", "scheme")),
    **dict.fromkeys(("hardware", "runtime", "run_context", "run_batch", "kept")),
    "schemes": (), "unfused": False, "check": 0, "beside": False, "narrow": (), "rounding": None, "measure": None,
    "activations": None, "threads": 1, "form": "compressed-tensors",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"latency": 0.1, "rate": 3.0}, "say the same"),
        ({"memory": 1, "size": 1}, "name one of"),
        ({"runtime": "vllm"}, "--runtime goes with a budget"),
        ({"memory": 10**9, "narrow": ("int8-g32",), "measure": "output"}, "name the cache with --kv"),
        ({"measure": "kl"}, "--measure goes with a budget"),
        ({"beside": True}, "--leave-out goes with a budget"),
        ({"bits": 3.0, "beside": True}, "say how many with --check N"),
        ({"bits": 3.0, "run_context": 5}, "go with --memory"),
        ({"kl": 0.1, "latency": 0.1, "text": "x"}, "measured as a whole"),
        ({"hardware": "x86-ddr5"}, "say it with --memory"),
        ({"hardware": "rtx-409"}, "near it"),
        ({"memory": 1, "runtime": "tgi"}, "there are: vllm"),
        ({"memory": 1, "kept": "q8_0"}, "no such runtime has a cache"),
        ({"memory": 1, "runtime": "mlx"}, "mlx does not load compressed-tensors; name another"),
        ({"memory": 1, "runtime": "vllm", "hardware": "m2"}, "vllm does not load compressed-tensors on m2"),
        ({"memory": 1, "runtime": "transformers"}, "no choice of schemes makes that smaller"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises((click.UsageError, UsageError), match=words):
        make_budget({**OPTIONS, **given}, None)


def test_a_profile_gives_memory_and_bandwidth() -> None:
    found = make_budget({**OPTIONS, "hardware": "rtx-4090", "run_context": 100}, None)
    assert found and found.running and found.memory == int(24e9 * 0.9) and found.latency is None
    assert (found.running.runtime, found.running.context, found.running.machine) == ("vllm", 100, "rtx-4090")
    timed = make_budget({**OPTIONS, "size": 5, "hardware": "rtx-4090", "rate": 40.0, "form": "gguf"}, None)
    assert timed and timed.running and timed.memory is None and timed.latency == 0.025
    assert timed.asked == "--tokens-per-second 40"
    assert timed.running.bandwidth == find("rtx-4090").bandwidth and timed.running.runtime == "llama.cpp"
    names = [running("gguf", find(name), None, "f16", 1, 1)[0].runtime for name in ("x86-ddr5", "pi5", "m2")]
    assert names == ["lowbit", "lowbit", "llama.cpp"]


def test_the_cache_may_be_what_narrow_names_and_the_runtime_has(capsys: pytest.CaptureFixture[str]) -> None:
    def others(**given: Any) -> tuple[Kept, ...]:
        found = make_budget({**OPTIONS, "memory": 10**9, **given}, None)
        assert found and found.running
        return found.running.others

    assert others(narrow=("int8-row", "int8-g32")) == (Kept("int8", 9.0, "int8-g32"),)
    assert others() == others(narrow=("int8-g32",), kept="f32") == ()
    assert capsys.readouterr().err == ""
    assert others(narrow=("int8-row",)) == ()
    assert "the cache stays f16: lowbit has int8-g32 (int8) for it, none of --narrow" in capsys.readouterr().err
    with pytest.raises(click.UsageError, match="decides with --activations"):
        make_budget({**OPTIONS, "rounding": 0.1}, None)


def test_the_command_says_what_the_plan_takes(wiki_8m: Path, tmp_path: Path) -> None:
    text = wiki_8m.parent / "evaluation.txt"
    source, rules = open_checkpoint(wiki_8m), Rules(method="rtn")
    samples = read_samples((str(text),), source, samples=4, length=64, seed=0, sampling="random")
    offers = make_offers(source, rules, ("int4-g64", "int8-g64"))
    losses = {n: {s: float(s == "int4-g64") for s in row} for n, row in offers.items()}
    saved = tmp_path / "s.json"
    narrow = {f"model.layers.{n} keys": {"fp8-e4m3-tensor": 1e-6} for n in range(2)}
    facts = conditions(source, rules, samples.sha256)
    saved.write_text(Sensitivity(facts, losses, narrow, {"x": ("x",)}).to_json())
    words = [str(wiki_8m), "--method", "rtn", "--calibration", str(text), "--samples", "4", "--sequence-length", "64"]
    words += ["--schemes", "int4-g64,int8-g64", "--sensitivity", str(saved), "--run-context", "256"]
    done = CliRunner().invoke(
        command, [*words, "--memory", "24MiB", "--hardware", "rtx-4090", "--json", "--narrow", "fp8-e4m3-tensor"]
    )
    assert done.exit_code == 0, done.output
    assert "memory at run time: " in done.stderr and " of 24 MiB = weights " in done.stderr
    assert re.search(r"cache: (fp8 2e-06|f16 0) nats, \S+ \S+; not (f16 0|fp8 2e-06) nats", done.stderr)
    assert "ms = weights" in done.stderr and "tokens/s in all (rtx-4090, at 1,008.0 GB/s)" in done.stderr
    assert {row["scheme"] for row in json.loads(done.stdout)["tensors"]} >= {None}
