"""Kinds of sensitivity beside their definitions, worked out by transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from lowbit.budget import MemoryWatch
from lowbit.cli.plan import command
from lowbit.methods import NoOptions, rtn
from lowbit.schemes import parse
from lowbit.stages.budgets import measures, sensitivity
from lowbit.stages.budgets.allocate import undecided
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Rules, make_offers
from tests.reference.models import save_tiny, save_words

IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))
HELD = IDS[3:]  # of four windows one judges
INSIDE, EMBEDDING, HEAD = "model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight", "lm_head.weight"


@contextmanager
def running(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[sensitivity.Run, Any]]:
    """A run in which these weights of a tiny Llama are on offer in one scheme, and the model in float64."""
    model = save_tiny("llama", folder / "m").double()
    source, rules = open_checkpoint(folder / "m"), Rules(method="rtn", format="gguf")
    every = make_offers(source, rules, ("q4_0", "keep"))
    offers = {name: every[name] for name in names}
    with (
        MemoryWatch(None).running() as watch,
        sensitivity.opened(source, undecided(source, rules, offers), offers, IDS, folder, None, 1, watch) as run,
    ):
        yield run, model


def error(model: Any, name: str) -> Tensor:
    """What rounding leaves of a weight."""
    weight: Tensor = model.get_parameter(name).detach()
    found = rtn.quantize(weight.float().contiguous(), {}, parse("q4_0"), NoOptions()).dequantize()
    return found.to(weight) - weight


@torch.no_grad()
def test_output_errors_are_those_of_rows_that_judge(tmp_path: Path) -> None:
    with running(tmp_path, (INSIDE, EMBEDDING, HEAD)) as (run, model):
        found = measures.measure("output", run).losses
    seen = dict[str, Tensor]()
    for name in (INSIDE, HEAD):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(HELD)
    for name in (INSIDE, HEAD):
        moved, made = seen[name] @ error(model, name).T, seen[name] @ model.get_parameter(name).T
        ratio = moved.square().sum() / made.square().sum()
        assert found[name] == {"q4_0": pytest.approx(float(ratio), rel=1e-3), "keep": 0.0}
    rows = error(model, EMBEDDING)[HELD].square().sum() / model.get_parameter(EMBEDDING)[HELD].square().sum()
    assert found[EMBEDDING] == {"q4_0": pytest.approx(float(rows), rel=1e-3), "keep": 0.0}


def test_the_trace_is_that_of_the_whole_hessian(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(measures, "_PROBES", 256)
    with running(tmp_path, (INSIDE,)) as (run, model):
        estimate, losses = measures.mean_traces(run)[INSIDE], measures.measure("hessian", run).losses
    weight = model.get_parameter(INSIDE)
    with sdpa_kernel(SDPBackend.MATH):
        loss = cross_entropy(model(HELD).logits[0, :-1], HELD[0, 1:])
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        rows = [torch.autograd.grad(each, weight, retain_graph=True)[0].flatten() for each in gradient.flatten()]
    hessian = torch.stack(rows)
    sigma = float(2 * (hessian.square().sum() - hessian.diag().square().sum()) / 256) ** 0.5  # of random signs
    trace = float(hessian.trace())
    assert abs(estimate * weight.numel() - trace) < 4 * sigma < abs(trace) / 2, (
        estimate * weight.numel(),
        trace,
        sigma,
    )
    wanted = abs(estimate) * float(error(model, INSIDE).square().sum())
    assert losses == {INSIDE: {"q4_0": pytest.approx(wanted, rel=1e-3), "keep": 0.0}}


@torch.no_grad()
def test_the_true_divergence_is_that_of_each_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(measures, "_TOGETHER", 2)
    names = (INSIDE, EMBEDDING, HEAD)
    with running(tmp_path, names) as (run, model):
        found = measures.measure("kl", run).losses
    before = model(HELD).logits.log_softmax(-1)
    for name in names:
        weight, moved = model.get_parameter(name), error(model, name)
        weight += moved
        after = model(HELD).logits.log_softmax(-1)
        weight -= moved
        wanted = float((before.exp() * (before - after)).sum(-1).mean())
        assert found[name] == {"q4_0": pytest.approx(wanted, rel=2e-3), "keep": 0.0}


def test_a_plan_says_what_its_prediction_is(tmp_path: Path) -> None:
    assert set(measures.MEASURES) == {"fisher", "output", "hessian", "kl"}
    save_tiny("llama", tmp_path / "m")
    text = str(save_words(tmp_path / "m"))
    words = [str(tmp_path / "m"), "--method", "rtn", "--calibration", text, "--samples", "4", "--sequence-length", "24"]
    words += ["--schemes", "int4-g8,int8-g8", "--bpw", "9", "--sensitivity", str(tmp_path / "s.json"), "--json"]
    done = CliRunner().invoke(command, [*words, "--measure", "output", "--out", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.stderr
    assert "relative square error of outputs, which is no divergence" in done.stderr
    rows = [row for row in json.loads(done.stdout)["tensors"] if row["scheme"]]
    assert {row["reason"] for row in rows} == {"predicted, in relative square error of outputs"}
    assert json.loads((tmp_path / "s.json").read_text())["measure"] == "output"
    other = CliRunner().invoke(command, [*words, "--out", str(tmp_path / "plan.json")])
    assert "was measured with measure 'output', not 'fisher'" in str(other.exception)
