"""Low-rank terms as a PEFT adapter: read back by `peft` where it is installed, and by the definition."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit.cli import group
from lowbit.corrections import LowRank
from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.runtime.runner import open_runner
from lowbit.stages._adapter import read_adapter, write_adapter
from lowbit.stages.evaluate import evaluate
from tests.interop.models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft's at transformers

_RANKS = {"layers.0.self_attn.q_proj": 3, "layers.0.mlp.down_proj": 8, "layers.1.mlp.down_proj": 3}


def terms_of(model: Any) -> dict[str, LowRank]:
    """Random terms, exact in bfloat16, of several ranks."""
    torch.manual_seed(1)
    found = {}
    for module, rank in _RANKS.items():
        rows, cols = model.get_submodule(f"model.{module}").weight.shape
        draw = torch.randn(rank, cols), torch.randn(rows, rank) / 8
        found[f"model.{module}.weight"] = (draw[0].bfloat16().float(), draw[1].bfloat16().float())
    return found


def logits_with(model: Any, terms: dict[str, LowRank]) -> Tensor:
    """The definition: the terms are added to the weights."""
    with torch.no_grad():
        for name, (down, up) in terms.items():
            model.get_parameter(name).add_(up @ down)
        logits: Tensor = model(input_ids=torch.arange(20)[None]).logits
    return logits


def tell(path: Path, **told: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))


def adapted(model: Any, path: Path, kind: str = "LORA", **told: Any) -> Any:
    """An adapter of peft around a model, whose parts are not trivial, saved there."""
    peft: Any = pytest.importorskip("peft")
    kinds = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config, "PREFIX_TUNING": peft.PrefixTuningConfig}
    made = peft.get_peft_model(model, kinds[kind](task_type="CAUSAL_LM", **told))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, part in made.named_parameters():
            if "lora_" in name or "ia3_" in name:
                part.add_(torch.randn_like(part), alpha=0.03 if "lora_" in name else 0.4)
    made.save_pretrained(path)
    return made.eval()


PAIRS: dict[str, Any] = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"]}
BY_NAME = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 7}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": PAIRS,
    "rslora": {**PAIRS, "use_rslora": True},
    "patterns": {**PAIRS, **BY_NAME},
    "dora": {**PAIRS, "use_dora": True},
    "ia3": {"kind": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("name", ["plain", "rslora", "patterns"])
def test_terms_are_scaled_as_peft_scales_them(name: str, tmp_path: Path) -> None:
    made = adapted(tiny_llama(torch.float32), tmp_path, **KINDS[name])
    with torch.no_grad():
        want = made(input_ids=torch.arange(20)[None]).logits
    plain = tiny_llama(torch.float32).eval()
    before = plain(input_ids=torch.arange(20)[None]).logits
    found = logits_with(plain, read_adapter(tmp_path))
    torch.testing.assert_close(found, want)
    assert (found - before).abs().max() > 0.01


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"alpha_pattern": {".*proj": 3}}, "alpha_pattern"),
        ({"alpha_pattern": [3]}, "alpha_pattern"),
    ],
)
def test_more_than_pairs_is_refused_where_pairs_are_read(told: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, terms_of(tiny_llama(torch.float32)), "some/model", torch.bfloat16)
    tell(tmp_path, **told)
    with pytest.raises(UnsupportedError, match=f"says {said}.*; only plain pairs"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(("kind", "scheme"), [*((kind, None) for kind in KINDS), ("patterns", "int4-g64")])
def test_texts_go_on_with_an_adapter_as_with_peft(kind: str, scheme: str | None, wiki_8m: Path, tmp_path: Path) -> None:
    """Of transformers' model, and of one of few bits, whose floats peft adds to; what is said tells of it."""
    library: Any = transformers
    model, base = library.LlamaForCausalLM.from_pretrained(wiki_8m, dtype=torch.float32), wiki_8m
    if scheme:
        base = tmp_path / "q"
        lowbit.quantize(wiki_8m, base, scheme=scheme, method="rtn")
        model = lowbit.load(base, reference=True)
    words = library.PreTrainedTokenizerFast.from_pretrained(wiki_8m)
    ids = words(PROMPT, return_tensors="pt").input_ids
    made = adapted(model, tmp_path / "lora", **KINDS[kind])
    with torch.no_grad():
        want = made.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    line = ["generate", str(base), PROMPT, "-n", "24", "--exact", "--adapter", str(tmp_path / "lora"), "--json"]
    done = CliRunner().invoke(group, line, catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["text"] == words.decode(want, skip_special_tokens=True)
    assert found["text"] != json.loads(CliRunner().invoke(group, [*line[:-3], "--json"]).stdout)["text"]
    assert "the class of transformers, as peft adds" in found["decoder"] and str(tmp_path / "lora") in found["decoder"]


PROMPT = "The history of the city"
Tensors = dict[str, Tensor]
STRANGE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "fewer": (lambda t: {k: v for k, v in t.items() if "layers.7." not in k}, "lacks 4 tensors, as 'base"),
    "more": (
        lambda t: t | {k.replace(".7.", ".8."): v.clone() for k, v in t.items() if ".7." in k},
        "has no place for all .* 4 tensors, as .*layers.8",
    ),
    "shapes": (lambda t: {k: v[:, :2].contiguous() for k, v in t.items()}, "does not fit .*size mismatch"),
    "names": (lambda t: {k.replace("layers", "h"): v for k, v in t.items()}, "lacks 32 tensors"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_an_adapter_of_another_model_is_refused(name: str, wiki_8m: Path, tmp_path: Path) -> None:
    library: Any = transformers
    adapted(library.LlamaForCausalLM.from_pretrained(wiki_8m, dtype=torch.float32), tmp_path / "lora", **PAIRS)
    change, said = STRANGE[name]
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(CheckpointError, match=said):
        open_runner(wiki_8m, adapter=tmp_path / "lora")
    if name != "fewer":  # which pairs may well be
        (tmp_path / "text").write_text("The city. " * 200)
        with pytest.raises(CheckpointError, match=r"does not fit|is not as"):
            evaluate(wiki_8m, tmp_path / "text", adapter=tmp_path / "lora", context=64)


def test_what_is_no_folder_of_an_adapter_is_refused(wiki_8m: Path, tmp_path: Path) -> None:
    def refused(said: str, kind: type[Exception] = UsageError) -> None:
        with pytest.raises(kind, match=said):
            open_runner(wiki_8m, adapter=tmp_path / "lora")

    refused("holds no adapter: there is no adapter_config.json")
    write_adapter(tmp_path / "lora", terms_of(tiny_llama(torch.float32)), "some/model", torch.bfloat16)
    file, config = tmp_path / "lora" / "adapter_model.safetensors", tmp_path / "lora" / "adapter_config.json"
    data = file.read_bytes()
    file.write_bytes(data[:300])
    refused("the header claims", CheckpointError)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged: "):
        read_adapter(tmp_path / "lora")
    file.rename(file.with_name("adapter_model.bin"))
    refused("has its weights in adapter_model.bin, a pickle, which is not opened")
    file.write_bytes(data)
    tell(tmp_path / "lora", peft_type="NONE")
    refused("is no configuration of an adapter: 'NONE'", CheckpointError)
    config.write_text("[]")
    refused("is no configuration of an adapter", CheckpointError)
    library: Any = transformers
    model = library.LlamaForCausalLM.from_pretrained(wiki_8m)
    adapted(model, tmp_path / "prefix", "PREFIX_TUNING", num_virtual_tokens=2)
    with pytest.raises(UnsupportedError, match="kind PREFIX_TUNING, which adds tokens and no layers"):
        open_runner(wiki_8m, adapter=tmp_path / "prefix")


def test_without_peft_it_is_asked_for(wiki_8m: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, terms_of(tiny_llama(torch.float32)), "some/model", torch.bfloat16)
    code = "import sys; sys.modules['peft'] = None; from lowbit.cli import main; sys.argv[0] = 'lowbit'; main()"
    line = [sys.executable, "-c", code, "generate", str(wiki_8m), PROMPT, "--adapter", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "lowbit: an adapter needs the package peft (pip install peft)" in done.stderr
    assert "Traceback" not in done.stderr


def test_terms_that_lie_in_a_checkpoint_are_not_forgotten(wiki_8m: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(wiki_8m, tmp_path / "model"))
    write_adapter(path / "adapter", terms_of(tiny_llama(torch.float32)), "some/model", torch.bfloat16)
    done = CliRunner().invoke(group, ["generate", str(path), PROMPT, "-n", "2"], catch_exceptions=False)
    assert f"run without the low-rank terms that lie in it; with them: --adapter {path / 'adapter'}" in done.stderr


def test_what_only_the_native_decoder_does_is_said(wiki_8m: Path, tmp_path: Path) -> None:
    library: Any = transformers
    adapted(library.LlamaForCausalLM.from_pretrained(wiki_8m, dtype=torch.float32), tmp_path / "lora", **PAIRS)
    said = list[str]()
    open_runner(wiki_8m, adapter=tmp_path / "lora", keep="int8", cache=tmp_path / "kept", note=said.append)
    assert said == [
        "keys and values are not kept in int8, but as transformers keeps them",
        f"nothing is kept in {tmp_path / 'kept'}: that is for the native decoder",
    ]
    assert not (tmp_path / "kept").exists()


def test_the_files_are_a_lora_adapter(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32).eval()
    terms = terms_of(model)
    write_adapter(tmp_path, terms, "some/model", torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.mlp.down_proj": 8}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * len(terms)
    merged = {}
    for module, rank in _RANKS.items():
        down, up = (stored[f"base_model.model.model.{module}.lora_{part}.weight"] for part in "AB")
        assert down.dtype == up.dtype == torch.bfloat16
        assert len(down) == rank
        merged[f"model.{module}.weight"] = (down.float(), up.float())
    torch.testing.assert_close(logits_with(tiny_llama(torch.float32).eval(), merged), logits_with(model, terms))


def test_peft_adds_the_terms(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    terms = terms_of(tiny_llama(torch.float32))
    write_adapter(tmp_path, terms, "some/model", torch.bfloat16)
    model = peft.PeftModel.from_pretrained(tiny_llama(torch.float32), tmp_path).eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(20)[None]).logits
    torch.testing.assert_close(found, logits_with(tiny_llama(torch.float32).eval(), terms))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    terms = terms_of(tiny_llama(torch.float32))
    write_adapter(tmp_path, terms, "some/model", torch.bfloat16)
    found = read_adapter(tmp_path)
    assert found.keys() == terms.keys()
    for name, (down, up) in terms.items():
        assert torch.equal(found[name][0], down) and torch.equal(found[name][1], up)


def test_a_rank_that_is_not_said_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, terms_of(tiny_llama(torch.float32)), "some/model", torch.bfloat16)
    tell(tmp_path, r=16)
    with pytest.raises(CheckpointError, match=r"is not as adapter_config\.json says"):
        read_adapter(tmp_path)


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    term = (torch.ones(1, 4), torch.ones(4, 1))
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj is no weight"):
        write_adapter(tmp_path, {"model.layers.0.mlp.experts.gate_up_proj": term}, "m", torch.float32)
    with pytest.raises(UnsupportedError, match="at least one"):
        write_adapter(tmp_path, {}, "m", torch.float32)
