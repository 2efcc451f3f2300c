"""What errors are predicted to cost, what is chosen for a budget, and the search for a quality."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from lowbit.budget import MemoryWatch
from lowbit.cli._options import fold
from lowbit.cli.plan import command
from lowbit.cli.quantize import command as quantize
from lowbit.errors import QualityError, UsageError
from lowbit.formats import Weight
from lowbit.methods import NoOptions, rtn
from lowbit.schemes import parse
from lowbit.stages import _windows
from lowbit.stages._model import open_blueprint
from lowbit.stages._quality import Interval
from lowbit.stages.budgets import sensitivity
from lowbit.stages.budgets.allocate import Allocation, Budget, Checked, Problem, make_problem, undecided
from lowbit.stages.budgets.check import Case, check
from lowbit.stages.budgets.search import Trial, search
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.plan import Entry, Plan, Rules, load_plan, make_offers, make_plan
from lowbit.stages.write import make_shards
from tests.reference.models import save_tiny, save_words

IDS = torch.randint(3, 96, (64, 24), generator=torch.Generator().manual_seed(1))
HELD = IDS[48:]


@contextmanager
def running(
    source: Checkpoint, plan: Plan, offers: sensitivity.Offers, folder: Path, ids: Tensor = IDS
) -> Iterator[sensitivity.Run]:
    with (
        MemoryWatch(None).running() as watch,
        sensitivity.opened(source, plan, offers, ids, folder, None, 1, watch) as run,
    ):
        yield run


@torch.no_grad()
def divergence(model: Any, values: Mapping[str, Tensor]) -> float:
    """KL of the model from itself with weights replaced together, by transformers in float64, on windows that judge."""
    weights, before = dict(model.named_parameters()), model(HELD).logits.log_softmax(-1)
    kept = {name: weights[name].detach().clone() for name in values}
    for name, value in values.items():
        weights[name].copy_(value)
    after = model(HELD).logits.log_softmax(-1)
    for name in values:
        weights[name].copy_(kept[name])
    return float((before.exp() * (before - after)).sum(-1).mean())


def rounded(weight: Tensor, scheme: str) -> Tensor:
    return rtn.quantize(weight.float().contiguous(), {}, parse(scheme), NoOptions()).dequantize().to(weight)


@pytest.mark.parametrize(
    ("kind", "rules", "schemes"),
    [
        ("llama", Rules(method="rtn"), ("int4-g8", "int6-g8")),
        ("gpt2", Rules(method="rtn", format="gptq"), ("int4-g16",)),
        ("llama", Rules(method="ggml", format="gguf"), ("q8_0", "q4_0")),
    ],
)
@torch.no_grad()
def test_what_is_predicted_is_the_divergence(kind: str, rules: Rules, schemes: tuple[str, ...], tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path / "m")
    source = open_checkpoint(tmp_path / "m")
    offers = make_offers(source, rules, schemes)
    with running(source, make_plan(source, rules), offers, tmp_path) as run:
        found = sensitivity.measure(run).losses
    assert found.keys() == offers.keys() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    model, ratios = model.double(), []
    weights = dict(model.named_parameters())
    for name, row in found.items():
        for scheme, loss in row.items():
            weight, turned = weights[name].detach(), kind == "gpt2"
            value = rounded(weight.T if turned else weight, scheme)
            ratios.append(loss / divergence(model, {name: value.T if turned else value}))
    assert len(ratios) >= 8
    assert 0.75 < sum(ratios) / len(ratios) < 1.3, ratios
    assert min(ratios) > 0.4 and max(ratios) < 2.5, ratios


JOINED = tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("form", "cases"),
    [
        ("compressed-tensors", [(JOINED, "int3-g8"), (JOINED, "int6-g8"), ((DOWN,), "int3-g8")]),
        ("gguf", [(("model.embed_tokens.weight",), "q4_0"), (("lm_head.weight",), "q8_0")]),
    ],
)
def test_a_checked_decision_has_its_true_divergence(
    form: str, cases: list[tuple[tuple[str, ...], str]], tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "m").double()
    source, rules = open_checkpoint(tmp_path / "m"), Rules(method="rtn", format=form)
    offers = make_offers(source, rules, tuple(dict.fromkeys(scheme for _, scheme in cases)))
    plan, asked = undecided(source, rules, offers), [Case(*case) for case in cases]
    with running(source, plan, offers, tmp_path) as run:
        found = check(run, asked)
    stored = [str(offers[names[0]][scheme].weight.scheme) for names, scheme in cases]  # the format's type of scales
    weights = {name: value.detach() for name, value in model.named_parameters()}
    wanted = [
        divergence(model, {name: rounded(weights[name], scheme) for name in names})
        for (names, _), scheme in zip(cases, stored, strict=True)
    ]
    assert found == pytest.approx(wanted, rel=2e-3)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_what_is_left_out_is_what_it_adds_to_the_plan(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "m").double()
    source, rules = open_checkpoint(tmp_path / "m"), Rules(method="rtn")
    offers = make_offers(source, rules, ("int4-g8", "int6-g8", "keep"))
    plan = {name: "int4-g8" if ".0." in name else "int6-g8" for name in offers}
    plan["model.layers.1.mlp.up_proj.weight"] = "keep"
    asked = [Case(JOINED, "int4-g8"), Case(JOINED, "int6-g8"), Case((DOWN,), "int4-g8"), Case((DOWN,), "keep")]
    with running(source, undecided(source, rules, offers), offers, tmp_path) as run:
        found = check(run, asked, plan)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def of(schemes: Mapping[str, str]) -> float:
        stored = {n: str(offers[n][s].weight.scheme) for n, s in schemes.items() if s != "keep"}
        return divergence(model, {name: rounded(weights[name], scheme) for name, scheme in stored.items()})

    wanted = [of({**plan, **case.alone}) - of({**plan, **dict.fromkeys(case.names, "keep")}) for case in asked]
    assert min(wanted[:3]) > 0, wanted
    assert found == pytest.approx(wanted, rel=5e-3)


OFFERED = ("int3-g8-f16", "int4-g8-f16", "int6-g8-f16", "int8-g8-f16")


def problem(
    path: Path,
    losses: Callable[[str, str], float],
    rules: Rules | None = None,
    fused: bool = True,
    schemes: tuple[str, ...] = OFFERED,
) -> Problem:
    save_tiny("llama", path, torch.float16)
    source, rules = open_checkpoint(path), rules or Rules(method="rtn")
    offers = make_offers(source, rules, schemes)
    plan = undecided(source, rules, offers)
    return make_problem(source, rules, offers, {n: {s: losses(n, s) for s in offers[n]} for n in offers}, fused, plan)


def steep(name: str, scheme: str) -> float:
    """Each bit quarters the loss; layer 1 matters a hundred times as much, down_proj ten times."""
    return 4.0 ** -parse(scheme).grid.bits * (100 if ".1." in name else 1) * (10 if "down" in name else 1)


def chosen(found: Allocation) -> dict[str, str]:
    return {e.weight.name: str(e.weight.scheme) for e in found.plan.entries if e.weight.scheme}


def test_bits_are_kept_and_go_where_they_count(tmp_path: Path) -> None:
    found = problem(tmp_path / "m", steep, fused=False).within_bits(7.0)
    assert 6.8 < found.plan.bits_per_weight()[0] <= 7.0
    schemes = chosen(found)
    more, less = schemes["model.layers.1.mlp.down_proj.weight"], schemes["model.layers.0.mlp.up_proj.weight"]
    assert parse(more).grid.bits > parse(less).grid.bits
    assert found.loss == pytest.approx(sum(steep(name, scheme) for name, scheme in schemes.items()))
    costs = {entry.weight.name: entry.costs for entry in found.plan.entries if entry.weight.scheme}
    assert all(
        row == {scheme: steep(name, scheme) for scheme in row} and 2 <= len(row) <= 3 for name, row in costs.items()
    )
    assert all(next(iter(row)) == found.chosen[name] for name, row in costs.items())
    assert all(entry.why.startswith("costs ") for entry in found.plan.entries if entry.weight.scheme)


def test_what_a_runtime_joins_has_one_scheme(tmp_path: Path) -> None:
    def odd(name: str, scheme: str) -> float:
        return steep(name, scheme) * (1000 if "q_proj" in name or "up_proj" in name else 1)

    found = problem(tmp_path / "m", odd)
    assert sorted(len(group) for group in found.groups) == [1, 1, 1, 1, 2, 2, 3, 3]
    schemes = chosen(found.within_bits(6.5))
    for names in found.groups:
        assert len({schemes[name] for name in names}) == 1
    apart = chosen(problem(tmp_path / "n", odd, fused=False).within_bits(6.5))
    assert apart["model.layers.0.self_attn.q_proj.weight"] != apart["model.layers.0.self_attn.v_proj.weight"]


def test_files_are_not_larger_than_asked(tmp_path: Path) -> None:
    parts = problem(tmp_path / "m", steep)
    smallest, largest = parts.smallest().size, parts.within_loss(0.0).size
    for share in (0.0, 0.3, 0.7, 1.0):
        size = int(smallest + share * (largest - smallest))
        found = parts.within_size(size)
        assert found.size == sum(shard.nbytes for shard in make_shards(found.plan)) <= size
        assert found.size > size - 0.05 * largest
    with pytest.raises(UsageError, match=f"takes {smallest:,}"):
        parts.within_size(smallest - 1)
    with pytest.raises(UsageError, match="together"):
        parts.within_bits(3.0)


def test_the_plan_is_one_like_any_other(tmp_path: Path) -> None:
    parts = problem(tmp_path / "m", steep)
    plan = parts.within_bits(7.0).plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "plan.json", parts.source) == plan


def test_the_table_says_which_layers_got_what_and_what_they_cost(tmp_path: Path) -> None:
    def loss(name: str, scheme: str) -> float:
        return 4.0 ** -parse(scheme).grid.bits * (30 if "1.mlp.down" in name else 1.5 if ".1." in name else 1)

    plan = problem(tmp_path / "m", loss, fused=False).within_bits(7.0).plan
    rows, listed = fold(plan), dict[str, str]()
    assert len(rows) < len(plan.entries)
    for name, _, scheme, *_, reason in rows:
        whole = re.fullmatch(r"(?:(\d+) x )?(.*?)(?:\{([\d,-]+)\}|\*)?([^{}*]*)", name)
        assert whole, name
        parts = [part.split("-") for part in (whole[3] or "0-1").split(",")]
        numbers = [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)] if whole[1] else [0]
        names = [f"{whole[2]}{n}{whole[4]}" if whole[1] else f"{whole[2]}{whole[4]}" for n in numbers]
        assert len(names) == int(whole[1] or 1)
        listed |= dict.fromkeys(names, scheme)
        if costs := re.fullmatch(r"cost (\S+) to (\S+) each, (\S+) together: predicted, in nats per token", reason):
            wanted = sorted(loss(each, scheme) for each in names)
            assert [float(each) for each in costs.groups()] == pytest.approx(
                [wanted[0], wanted[-1], sum(wanted)], rel=0.06
            )
    assert listed == {entry.weight.name: str(entry.weight.scheme or "keep") for entry in plan.entries}
    assert any(" together: " in row[-1] for row in rows) and any("costs" in row[-1] for row in rows)


def test_set_skip_and_policy_are_left_alone_by_a_budget(tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text('[[rule]]\npattern = "up_proj"\nscheme = "int5-g8"\n[[rule]]\nscheme = "base"\n')
    rules = Rules(method="rtn", skip=("o_proj",), sets=(("k_proj", "int2-g8"),), policy=str(policy))
    parts = problem(tmp_path / "m", steep, rules)
    assert {name.split(".")[4] for name in parts.offers} == {"q_proj", "v_proj", "gate_proj", "down_proj"}
    schemes = chosen(parts.within_bits(8.5))
    assert schemes["model.layers.0.self_attn.k_proj.weight"].startswith("int2-g8")
    assert schemes["model.layers.0.mlp.up_proj.weight"].startswith("int5-g8")
    assert "model.layers.0.self_attn.o_proj.weight" not in schemes


def test_what_was_measured_decides_again(tmp_path: Path) -> None:
    parts, budget = problem(tmp_path / "m", steep, fused=False), Budget(bits=7.0, check=3)
    first = parts.within(budget)
    cases = parts.nearest(budget, first)
    assert len(cases) == 6 and len({case.names for case in cases}) == 3
    predicted = [sum(parts.losses[name][case.scheme] for name in case.names) for case in cases]
    for own, other in zip(cases[::2], cases[1::2], strict=True):
        assert own.names == other.names and first.chosen[own.names[0]] == own.scheme != other.scheme
    halved, ratio = parts.corrected(cases, [loss / 2 for loss in predicted])
    assert ratio == pytest.approx(0.5) and halved.within(budget).chosen == first.chosen
    assert halved.within(budget).loss == pytest.approx(first.loss / 2)
    moved = [loss * (100 if case.scheme == first.chosen[case.names[0]] else 1e-3) if at < 2 else loss
             for at, (case, loss) in enumerate(zip(cases, predicted, strict=True))]  # fmt: skip
    again = parts.corrected(cases, moved)[0].within(budget)
    assert again.chosen[cases[0].names[0]] == cases[1].scheme
    changed = {name: (first.chosen[name], scheme) for name, scheme in again.chosen.items()}
    assert "3 decisions measured" in next(Checked(3, 0.5, changed).lines())


class Measured:
    """Stands in for quantizing: what is measured is some function of what is predicted."""

    def __init__(self, truth: Callable[[float], float]) -> None:
        self.truth, self.seen = truth, list[Allocation]()

    def __call__(self, found: Allocation) -> Interval:
        self.seen.append(found)
        value = self.truth(found.loss)
        return Interval(value, 0.9 * value, 1.1 * value)


@pytest.mark.parametrize("truth", [lambda x: 3 * x, lambda x: x / 3, lambda x: x**0.7 / 2, lambda x: 2 * x**1.5 + 0.02])
def test_the_search_ends_with_a_plan_that_passes_and_is_nearly_the_smallest(
    truth: Callable[[float], float], tmp_path: Path
) -> None:
    parts, limit = problem(tmp_path / "m", steep, fused=False), 1.0
    measure = Measured(truth)
    found = search(parts, limit, measure)
    assert found.passes and 1.1 * truth(found.allocation.loss) <= limit and len(measure.seen) <= 5
    low, high = 1e-9, 100.0  # the largest predicted loss that passes
    for _ in range(60):
        low, high = (m, high) if 1.1 * truth(m := (low * high) ** 0.5) <= limit else (low, m)
    assert found.allocation.size <= 1.04 * parts.within_loss(low).size


@pytest.mark.parametrize("factor", [0.4, 0.85, 1.3, 2.5])
def test_the_next_smaller_plan_of_a_search_fails(factor: float, tmp_path: Path) -> None:
    parts, measure = problem(tmp_path / "m", steep, fused=False), Measured(lambda loss: factor * loss)
    found = search(parts, 1.0, measure).allocation
    smaller = parts.within_size(found.size - 1)
    assert 1.1 * factor * smaller.loss > 1.0 and smaller.plan in [each.plan for each in measure.seen]


def test_a_trial_says_what_was_asked_in_its_own_unit(tmp_path: Path) -> None:
    found = problem(tmp_path / "m", steep).within_bits(7.0)
    (said,) = Trial(found, Interval(0.0087, 0.0051, 0.0123), 0.01, share=True).lines()
    assert said.endswith("increase of the perplexity 0.870% [0.510%, 1.230%], at most 1.000% was asked for: misses")
    (said,) = Trial(found, Interval(0.0087, 0.0051, 0.0099), 0.01).lines()
    assert said.endswith(" nats per token: divergence 0.0087 [0.0051, 0.0099], at most 0.01 was asked for: passes")


def test_the_text_is_split_once_for_all_plans_that_are_tried(tmp_path: Path, monkeypatch: Any) -> None:
    save_tiny("llama", tmp_path / "m")
    text, split = str(save_words(tmp_path / "m")), list[str]()
    encode = _windows._encode_one

    def counted(source: Checkpoint, text: _windows.Text, limit: int | None) -> Any:
        split.append(text.name)
        return encode(source, text, limit)

    monkeypatch.setattr(_windows, "_encode_one", counted)
    words = [str(tmp_path / "m"), "--method", "rtn", "--calibration", text, "--samples", "8", "--sequence-length", "24"]
    words += ["--schemes", "int4-g8,int6-g8,int8-g8", "--evaluate", text, "--context", "24", "--max-kl", "0.02"]
    done = CliRunner().invoke(command, [*words, "--out", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.stderr
    assert ", at most 0.02 was asked for: passes" in done.stderr and split == ["words.txt"]


def test_the_report_tells_how_the_budget_was_met(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    text, out = str(save_words(tmp_path / "m")), tmp_path / "out"
    words = ["--method", "rtn", "--calibration", text, "--samples", "8", "--sequence-length", "24", "--schemes"]
    words += ["int4-g8,int8-g8", "--bits-per-weight", "9.5"]
    done = CliRunner().invoke(quantize, [str(tmp_path / "m"), str(out), *words])
    assert done.exit_code == 0, done.stderr
    (said,) = json.loads((out / "report.json").read_text())["decided"]
    assert said.startswith("plan of ") and said.endswith(" nats per token of divergence from the original")
    assert said in done.stderr


def test_a_quality_that_no_plan_has_is_refused_with_the_best(tmp_path: Path) -> None:
    with pytest.raises(QualityError, match="best of 1 measured has 5, upper end 5"):
        search(problem(tmp_path / "m", steep), 1e-9, Measured(lambda _: 5.0))


FACTS: Mapping[str, Any] = {
    "model": "m",
    "format": "gguf",
    "recipe": "rtn",
    "options": {},
    "text": "t",
    "measure": "fisher",
}
ROWS = {"a": {"q4_0": 0.5, "q8_0": 0.0}}


def test_what_was_measured_is_saved_and_used_again(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(sensitivity.Sensitivity(FACTS, ROWS).to_json())
    found = sensitivity.read_sensitivity(file, FACTS)
    assert found.losses == ROWS
    more = found.joined(sensitivity.Measured({"a": {"q5_0": 0.25}, "b": {"q4_0": 1.0}}))
    assert more.losses == {"a": {**ROWS["a"], "q5_0": 0.25}, "b": {"q4_0": 1.0}}
    entry = Entry(Weight("a", (32, 32), torch.float32), None, "")
    offers = {"a": dict.fromkeys(("q4_0", "q6_k"), entry), "b": dict[str, Entry](), "c": dict[str, Entry]()}
    assert found.lacking(offers) == {"a": {"q6_k": entry}, "b": {}, "c": {}}
    assert more.lacking(offers) == {"a": {"q6_k": entry}, "c": {}}


SAVED = json.loads(sensitivity.Sensitivity(FACTS, ROWS).to_json())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no sensitivities"),
        ("[" * 100_000, "holds no sensitivities"),
        ("[]", "holds no sensitivities"),
        ("null", "holds no sensitivities"),
        ({**SAVED, "losses": [1]}, "holds no sensitivities"),
        ({**SAVED, "losses": {"a": 1}}, "holds no sensitivities"),
        ({**SAVED, "losses": {"a": {"q4_0": "1"}}}, "is no loss"),
        ({**SAVED, "losses": {"a": {"q4_0": True}}}, "is no loss"),
        ({**SAVED, "losses": {"a": {"q4_0": -1.0}}}, "is no loss"),
        ({**SAVED, "losses": {"a": {"q4_0": float("nan")}}}, "is no loss"),
        ({**SAVED, "losses": {"a": {"q4_0": float("inf")}}}, "is no loss"),
        ({key: value for key, value in SAVED.items() if key != "losses"}, "holds no sensitivities"),
        ({**SAVED, "lowbit_sensitivity": 99}, "version 99"),
        ({**SAVED, "recipe": "gptq"}, "measured with recipe 'gptq', not 'rtn'"),
        ({**SAVED, "other": 1}, "measured with other 1"),
        ({**SAVED, "measure": "output"}, "measured with measure 'output', not 'fisher'"),
        ({**SAVED, "readers": {"a": 1}}, "holds no sensitivities"),
        ({key: value for key, value in SAVED.items() if key != "text"}, "measured with text None"),
    ],
)
def test_a_damaged_file_or_one_of_another_run_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=words):
        sensitivity.read_sensitivity(file, FACTS)


def test_checking_has_its_share_of_the_estimate(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    source, rules = open_checkpoint(tmp_path / "m"), Rules(method="rtn", format="gguf")
    offers, blueprint = make_offers(source, rules, ("q4_0", "q8_0")), open_blueprint(source, torch.float32)
    block = 4 * 32 * (2 * 32 + 2 * 16 + 2 * 48)  # no scheme fits the 48 inputs of down_proj
    decided = sensitivity._decided(blueprint, offers)
    assert decided == 2 * block + 3 * (2 * 4 * 96 * 32)
    ways = [sensitivity.plan_way(blueprint, offers, IDS, None, 1, each).parts for each in (False, True)]
    assert ways[0]["gradients"] == ways[1]["gradients"] > decided  # these are not held together


def test_one_window_is_too_few(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    source, rules = open_checkpoint(tmp_path / "m"), Rules(method="rtn")
    offers, plan = make_offers(source, rules, ("int4-g8",)), make_plan(source, rules)
    with pytest.raises(UsageError, match="two windows"), running(source, plan, offers, tmp_path, IDS[:1]):
        pass


def test_a_weight_that_no_scheme_fits_is_kept(tmp_path: Path) -> None:
    parts = problem(tmp_path / "m", steep, schemes=("int4-g32",))
    name = "model.layers.0.mlp.down_proj.weight"
    assert parts.offers[name] == {}  # 48 inputs are no whole groups of 32
    plan = parts.smallest().plan
    entry = next(entry for entry in plan.entries if entry.weight.name == name)
    assert entry.weight.scheme is None and "none of the schemes on offer" in entry.reason
