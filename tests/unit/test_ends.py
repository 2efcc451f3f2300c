"""Embeddings and output layers: what calibration says of them, and what the blocks then see."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.budget import PIECE, MemoryWatch
from lowbit.errors import WeightError
from lowbit.methods import gptq, mse
from lowbit.plugins import load
from lowbit.schemes import parse
from lowbit.stages._cost import outside_of, sloped_windows
from lowbit.stages._ends import Ends
from lowbit.stages._information import Backward
from lowbit.stages._model import open_blueprint
from lowbit.stages._observe import Seen
from lowbit.stages._row_views import apart_in_rows
from lowbit.stages._rows import rows_of
from lowbit.stages._state import Calibration as Work
from lowbit.stages._streams import Streams
from lowbit.stages.budgets import sensitivity
from lowbit.stages.calibrate import Prepared, _begin, _enter, calibrate, prepare
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.plan import Calibration, Entry, Rules, as_planned, make_offers, make_plan
from lowbit.stages.write import Output, open_output
from lowbit.tensors import QTensor
from tests.reference.models import save_tiny

IDS = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1))
ENDS = r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|embeddings|lm_head|embed_out)\."
EVEN: dict[str, Any] = dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size"), 64)  # groups are of 32
TIED = ["gemma", "gpt2", "bloom", "opt"]
FREE = ["llama", "gpt_neox", "qwen3_moe"]


def planned(folder: Path, method: str = "gptq", inputs: str = "quantized", **rules: Any) -> Prepared:
    source, text = open_checkpoint(folder / "model"), Calibration(("text",), inputs=inputs)
    sets = ((ENDS, "int3-g32-asym"),)
    plan = make_plan(source, Rules("int4-g32-asym", method, "mlx", sets=sets, calibration=text, **rules))
    return prepare(as_planned(source, plan), plan, IDS, None, 1)


@contextlib.contextmanager
def opened(kind: str, folder: Path, method: str = "gptq", **settings: Any) -> Iterator[tuple[Any, Work, Ends]]:
    model = save_tiny(kind, folder / "model", **EVEN)
    ready = planned(folder, method, **settings)
    with open_output(folder / "out", ready.source, ready.plan) as output, torch.no_grad():
        work = _begin(ready, output)
        with work.pool:
            yield model, work, Ends(work, outside_of(work.plan, work.blueprint), lambda done, total: None)


def drawn(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """By the whole model at once: gradients at what the embedding gives; what the output layer reads times theirs.

    Of the log probabilities of one token that is drawn at each position, summed over a window.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    dice, slopes, rows = torch.Generator().manual_seed(0), list[Tensor](), list[Tensor]()
    for window in ids:
        seen: list[Tensor] = []

        def leave(module: nn.Module, args: tuple[Tensor], made: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(made.detach().requires_grad_())
            return seen[-1]

        def look(module: nn.Module, args: tuple[Tensor], made: Tensor, seen: list[Tensor] = seen) -> None:
            seen.extend([args[0].detach(), made])

        hooks = [table.register_forward_hook(leave), head.register_forward_hook(look)]
        with torch.enable_grad():
            chances = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
            token = torch.multinomial(chances.detach().exp(), 1, generator=dice)
            at_first, at_last = torch.autograd.grad(chances.gather(1, token).sum(), [seen[0], seen[2]])
        for hook in hooks:
            hook.remove()
        slopes.append(at_first[0])
        rows.append(seen[1][0] * at_last[0].square().sum(-1, keepdim=True).sqrt())
    return torch.cat(slopes), torch.cat(rows)


def seen_of(work: Work, name: str, entry: Entry) -> Seen:
    return Backward(work, {name: entry}, (), lambda done, total: None).run()[name]


def tables_of(work: Work) -> Mapping[str, Entry]:
    return outside_of(work.plan, work.blueprint).tables


def moment(rows: Tensor) -> Tensor:
    return (rows.double().T @ rows.double() / len(rows)).float()


def information(slopes: Tensor, rows: Tensor | None = None) -> Tensor:
    """That of the slopes with three tenths of its mean on the diagonal, and of what an output layer reads."""
    found = moment(slopes) + 0.3 * slopes.square().mean() * torch.eye(slopes.shape[1])
    return found if rows is None else (found + moment(rows)) / 2


@pytest.mark.parametrize("kind", FREE)
def test_an_embedding_has_the_gradients_at_its_output_for_inputs(kind: str, tmp_path: Path) -> None:
    with opened(kind, tmp_path) as (model, work, _ends):
        (name, entry), *more = tables_of(work).items()
        seen = seen_of(work, name, entry)
        fit, held = (drawn(model, work.windows.ids[part])[0] for part in (slice(0, 7), slice(7, 8)))
    assert not more and seen.rows == len(fit) == 7 * 24
    torch.testing.assert_close(seen.stats["second_moment"], information(fit), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(seen.held, held, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", TIED)
def test_one_that_is_the_output_layer_too_has_both(kind: str, tmp_path: Path) -> None:
    with opened(kind, tmp_path) as (model, work, _ends):
        ((name, entry),) = tables_of(work).items()
        seen = seen_of(work, name, entry)
        slopes, rows = drawn(model, work.windows.ids[:7])
    assert not outside_of(work.plan, work.blueprint).heads
    torch.testing.assert_close(seen.stats["second_moment"], information(slopes, rows), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [*FREE, *TIED])
@pytest.mark.parametrize("method", ["gptaq", "rtn+lqer"])
def test_blocks_see_what_the_stored_embedding_looks_up(kind: str, method: str, tmp_path: Path) -> None:
    """The float stream, where there is one, begins with the float model's."""
    with opened(kind, tmp_path, method) as (model, work, ends):
        assert len(tables_of(work)) == 1
        ends.make_tables()
        _enter(work, ends.entrance())
        (name,) = tables_of(work)
        table, made = model.get_input_embeddings(), made_of(work.output, tables_of(work)[name]).dequantize()
        for kind_of in sorted(work.streams.kinds):  # `float` first
            if kind_of == "quantized":
                assert not torch.equal(table.weight, made)
                table.weight.copy_(made)
            first: list[Tensor] = []
            block = model.get_submodule(next(iter(work.blueprint.blocks)))
            hook = block.register_forward_pre_hook(
                lambda module, args, kwargs, first=first: first.append((*args, *kwargs.values())[0]), with_kwargs=True
            )
            model(input_ids=work.windows.ids, use_cache=False)
            hook.remove()
            torch.testing.assert_close(work.streams.read(kind_of, 0), first[0])


def made_of(output: Output, entry: Entry) -> QTensor:
    found = output.plan.rules.unpack(entry.weight, output.read(entry), None)
    assert isinstance(found, QTensor)
    return found


@pytest.mark.parametrize(
    ("method", "inputs", "skip"),
    [
        ("gptq", "quantized", ()),
        ("gptq", "quantized", (r"layers\.1\.",)),
        ("gptq", "float", ()),
        ("gptaq", "quantized", ()),
    ],
)
def test_an_output_layer_sees_what_the_quantized_model_gives_it(
    method: str, inputs: str, skip: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `gptaq` what the float model gives it."""
    found, make = dict[str, Seen](), Ends._make

    def keep(ends: Ends, entry: Entry, seen: Seen) -> None:
        found[entry.weight.name] = seen
        make(ends, entry, seen)

    monkeypatch.setattr(Ends, "_make", keep)
    model = save_tiny("llama", tmp_path / "model", **EVEN)
    ready = planned(tmp_path, method, inputs, skip=skip)
    rows: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, 1)))
    with open_output(tmp_path / "out", ready.source, ready.plan) as output, torch.no_grad():
        calibrate(ready, output, MemoryWatch(None))
        model(input_ids=IDS[:7])
        for entry in ready.plan.entries:
            if inputs == "quantized" and entry.weight.scheme and entry.weight.name != "lm_head.weight":
                model.get_parameter(entry.weight.name).copy_(made_of(output, entry).dequantize())
        model(input_ids=IDS[:7])
    seen, (exact, own) = found["lm_head.weight"], rows
    torch.testing.assert_close(seen.stats["second_moment"], moment(own), rtol=1e-3, atol=1e-5)
    assert seen.held.shape == (24, 32) and ("cross_moment" in seen.stats) == (method == "gptaq")
    if method == "gptaq":
        torch.testing.assert_close(seen.stats["cross_moment"], (exact - own).T @ own / len(own), rtol=1e-3, atol=1e-5)


class _Stop(Exception):
    pass


def _note(stages: list[str], stage: str, done: int, total: int) -> None:
    stages.append(stage)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("at", [("slopes", 0), ("slopes", 3), ("calibrate", 0), ("calibrate", 1), ("calibrate", 2)])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(kind: str, at: tuple[str, int], tmp_path: Path) -> None:
    save_tiny(kind, tmp_path / "model", **EVEN)
    ready = planned(tmp_path, "gptaq")

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == at:
            raise _Stop

    for folder, stops in (("whole", False), ("resumed", True)):
        if stops:
            with pytest.raises(_Stop), open_output(tmp_path / folder, ready.source, ready.plan) as output:
                calibrate(ready, output, MemoryWatch(None), stop)
        with open_output(tmp_path / folder, ready.source, ready.plan) as output:
            assert bool(output.resumed) == (stops and at[0] == "calibrate")
            stages: list[str] = []
            calibrate(ready, output, MemoryWatch(None), partial(_note, stages))
            assert ("slopes" in stages) == (not output.resumed), "an embedding that is there is not made again"
            stored = {name: record.stored for name, record in output.records.items()}
        if not stops:
            whole = stored
    assert stored == whole and {e.weight.name for e in ready.plan.entries if e.weight.scheme} <= stored.keys()


def test_an_embedding_is_better_where_the_predictions_look(wiki_8m: Path, tmp_path: Path) -> None:
    """On rows that judge, which gptq did not see: those of a trained model."""
    source = open_checkpoint(wiki_8m)
    plan = make_plan(source, Rules("q3_k_m", "gptq", "gguf", calibration=Calibration(("text",))))
    ids = torch.randint(3, 4096, (20, 128), generator=torch.Generator().manual_seed(1))
    ready = prepare(source, plan, ids, None, 2)
    with open_output(tmp_path / "out", source, plan) as output, torch.no_grad():
        work = _begin(ready, output)
        with work.pool:
            Ends(work, outside_of(work.plan, work.blueprint), lambda done, total: None).make_tables()
        facts = output.records["model.embed_tokens.weight"].facts
    assert output.records.keys() == {"model.embed_tokens.weight"}
    assert facts["method"] == "gptq" and facts["rows"] == 19 * 128
    ids, fitted = ids[19:], load("methods", "ggml_fit")
    model = open_blueprint(source, torch.float32).resident()
    slopes, _ = drawn(model, ids)
    weight, scheme = model.model.embed_tokens.weight.detach(), parse("q3_k")
    other = fitted.quantize(weight, {}, scheme, fitted.options()).dequantize()
    with torch.no_grad():
        share = (slopes @ (other - weight).T).square().sum() / (slopes @ weight.T).square().sum()
    assert facts["output_error"] < 0.8 * float(share)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"],
)
def test_what_is_no_number_is_named(name: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", **EVEN)
    with torch.no_grad():
        model.get_parameter(name)[5, 7] = float("nan")
    model.save_pretrained(tmp_path / "model")
    ready = planned(tmp_path)
    named = pytest.raises(WeightError, match=rf"{re.escape(name)}: nan at row 5, column 7")
    with named, open_output(tmp_path / "out", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))


def test_predictions_that_are_no_numbers_leave_an_embedding_to_others(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", **EVEN)
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    model.save_pretrained(tmp_path / "model")
    ready = planned(tmp_path)
    with open_output(tmp_path / "out", ready.source, ready.plan) as output:
        calibrate(ready, output, MemoryWatch(None))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            facts = output.records[name].facts
            assert (facts["method"], facts["fallback"]) == ("mse", "its inputs are not finite")


@pytest.mark.parametrize(
    ("method", "makes", "said"),
    [
        ("gptq", "gptq", None),
        ("gptaq", "gptaq", None),
        ("autoround", "gptq", "outside of the blocks, where single weights are made"),
        ("omniquant", "mse", "outside of the blocks, where no statistics are taken"),
    ],
)
def test_who_makes_them_is_said(method: str, makes: str, said: str | None, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", **EVEN)
    entries = [e for e in planned(tmp_path, method).plan.entries if ".layers." not in e.weight.name and e.weight.scheme]
    assert {(entry.method, entry.instead) for entry in entries} == {(makes, said)}


def test_slopes_are_taken_of_some_windows() -> None:
    assert sloped_windows(fit=120, held=8, length=512, width=256) == (16, 4)
    assert sloped_windows(fit=120, held=8, length=2048, width=8192) == (16, 1)
    assert sloped_windows(fit=3, held=1, length=64, width=64) == (3, 1)


def test_hidden_states_of_another_type_are_not_gone_on_from(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "hidden", (2, 3, 4), torch.float32, ("quantized",))
    for block in (0, 1):
        with streams.writing("quantized", block) as hidden:
            hidden.fill_(1)
    assert streams.latest(2) == 1
    assert replace(streams, dtype=torch.bfloat16).latest(2) == 0


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_budget_measures_them_as_they_will_be_made(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tokens that do not judge them."""
    monkeypatch.setattr(sensitivity, "_JUDGED", 24)
    model = save_tiny(kind, tmp_path / "model", **EVEN)
    source, ids = open_checkpoint(tmp_path / "model"), torch.cat([IDS] * 8)
    rules = Rules(method="gptq", format="gguf", calibration=Calibration(("text",)))
    offers, watch = make_offers(source, rules, ("q4_0", "q8_0")), MemoryWatch(None)
    with sensitivity.opened(source, make_plan(source, rules), offers, ids, tmp_path, None, 1, watch) as run:
        losses = sensitivity.measure(run).losses
        entry = offers["model.embed_tokens.weight"]["q4_0"]
        made, seen = sensitivity.made_outside(run, entry), run.ends
    slopes, rows = drawn(model, ids[49:])
    wanted = {"model.embed_tokens.weight": information(slopes, None if kind == "llama" else rows)}
    if kind == "llama":
        read: list[Tensor] = []
        hook = model.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(input_ids=ids[:48])
        hook.remove()
        wanted["lm_head.weight"] = moment(read[0])
    assert seen.keys() == wanted.keys() and wanted.keys() <= losses.keys()
    for name, expected in wanted.items():
        torch.testing.assert_close(seen[name].stats["second_moment"], expected, rtol=2e-3, atol=1e-5)
    scheme, options = parse("q4_0"), gptq.Options()
    prepared = gptq.prepare(seen["model.embed_tokens.weight"].stats, scheme, options)
    weight = model.model.embed_tokens.weight.detach()
    torch.testing.assert_close(made, gptq.quantize(weight, prepared, scheme, options).dequantize())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_budget_goes_on_where_nothing_was_seen_of_them(name: str, tmp_path: Path) -> None:
    """As when losses of blocks come from a file: what needs no statistics makes them."""
    save_tiny("llama", tmp_path / "model", **EVEN)
    source = open_checkpoint(tmp_path / "model")
    rules = Rules(method="gptq", format="gguf", calibration=Calibration(("text",)))
    offers, watch = make_offers(source, rules, ("q4_0",)), MemoryWatch(None)
    with sensitivity.opened(source, make_plan(source, rules), offers, IDS, tmp_path, None, 1, watch) as run:
        made = sensitivity.made_outside(run, offers[name]["q4_0"])
    wanted = mse.quantize(source.tensor(name), {}, parse("q4_0"), mse.Options())
    torch.testing.assert_close(made, wanted.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("piece", [PIECE, 1024])
@pytest.mark.parametrize("kept", [True, False])
def test_blocks_see_an_embedding_in_blocks_of_rows(kept: bool, piece: int, tmp_path: Path) -> None:
    """That are not the rows in their order; one of them as it is, or in a scheme of its own."""
    model = save_tiny("llama", tmp_path / "model", **EVEN)
    rows = [((0, 7), (40, 60)), ((7, 40), (60, 96))]
    source = apart_in_rows(open_checkpoint(tmp_path / "model"), {"model.embed_tokens.weight": rows})
    sets = (("rows0", "keep" if kept else "int8-g32-asym"), ("rows1", "int4-g32-asym"))
    plan = make_plan(source, Rules("int4-g32-asym", "gptq", "onnx", sets=sets, calibration=Calibration(("text",))))
    ready = prepare(as_planned(source, plan), plan, IDS, None, 1)
    ready = replace(ready, cost=replace(ready.cost, piece=piece))
    with open_output(tmp_path / "out", ready.source, ready.plan) as output, torch.no_grad():
        work = _begin(ready, output)
        with work.pool:
            ends = Ends(work, outside_of(work.plan, work.blueprint), lambda done, total: None)
            ends.make_tables()
            hidden = ends.entrance().hidden(IDS)
        table = model.model.embed_tokens.weight.detach().clone()
        for entry in plan.entries:
            if entry.weight.rows and entry.weight.scheme:
                table[rows_of(entry.weight.rows).long()] = made_of(output, entry).dequantize()
    assert len(tables_of(work)) == 2 - kept
    torch.testing.assert_close(hidden, table[IDS], rtol=0, atol=0)
