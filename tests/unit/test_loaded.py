"""What `lowbit.load` gives is a model as transformers' own `from_pretrained` gives it, whatever is asked or done."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lowbit
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.runtime.linear import Linear, PackedWeight
from lowbit.runtime.model import open_model
from lowbit.stages._model import is_linear
from tests.reference.models import save_tiny

IDS = torch.tensor([[3, 7, 1, 9, 60, 12]])


def quantized(kind: str, path: Path, **settings: Any) -> Path:
    """A tiny model in few bits."""
    save_tiny(kind, path / "m", **settings)
    lowbit.quantize(path / "m", path / "q", scheme="int4-g16", method="rtn")
    return path / "q"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases."""
    return quantized("qwen2", tmp_path_factory.mktemp("qwen2"))


def both(path: Path) -> tuple[Any, Any]:
    """On the kernels, and by torch."""
    return lowbit.load(path, exact=True), lowbit.load(path, reference=True)


def apart(one: Any, other: Any) -> float:
    """Greatest difference of logits."""
    with torch.no_grad():
        return float((one(IDS).logits.float() - other(IDS).logits.float()).abs().max())


def change(path: Path, **told: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))


def test_texts_go_on_as_the_checkpoint_says(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    file, auto = tmp_path / "generation_config.json", transformers.AutoModelForCausalLM

    def told() -> Any:
        ours = lowbit.load(tmp_path).generation_config
        assert ours.to_dict() == auto.from_pretrained(tmp_path).generation_config.to_dict()
        return ours

    change(file, do_sample=True, temperature=0.5, top_k=7, eos_token_id=[2, 15])
    assert (told().eos_token_id, told().temperature) == ([2, 15], 0.5)
    file.unlink()
    change(tmp_path / "config.json", top_k=3, do_sample=True)
    assert (told().top_k, told().eos_token_id) == (3, 2)


@pytest.mark.parametrize("told", ["x", ["x"], {"2": 1}, 1.5])
def test_a_damaged_generation_config_is_one_sentence(told: Any, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    change(tmp_path / "generation_config.json", eos_token_id=told)
    with pytest.raises(CheckpointError, match=r"generation_config.json has .* as eos_token_id, where the number"):
        lowbit.load(tmp_path)
    change(tmp_path / "generation_config.json", eos_token_id=2, max_new_tokens=-1)
    with pytest.raises(CheckpointError, match=r"generation_config.json says nothing usable .*: .max_new_tokens. must"):
        lowbit.load(tmp_path)


def test_it_has_all_parameters_and_says_what_they_take(llama: Path) -> None:
    ours, plain = both(llama)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [p.shape for p in ours.parameters()] == [p.shape for p in plain.parameters()]
    assert ours.num_parameters() == plain.num_parameters() and ours.name_or_path == str(llama)
    packed = {name: each for name, each in ours.named_parameters() if isinstance(each, PackedWeight)}
    assert len(packed) == 15 and not any(each.requires_grad for each in packed.values())
    rest = sum(4 * each.numel() for name, each in ours.named_parameters() if name not in packed)
    held = rest + sum(each.packed.panels.nbytes for each in packed.values())
    assert round(ours.get_memory_footprint(return_buffers=False)) == held < 0.6 * plain.get_memory_footprint()
    weight, values = ours.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight
    assert (
        torch.equal(weight.detach().float() * 1, values) and (weight.detach().numpy() == values.detach().numpy()).all()
    )
    assert "PackedWeight([48, 32], 4 bits" in repr(weight) and "32 to 48, 4 bits, floats" in repr(ours)


def test_a_copy_shares_packed_weights_and_nothing_else(qwen2: Path) -> None:
    ours = lowbit.load(qwen2)
    made = copy.deepcopy(ours)
    assert apart(ours, made) == 0
    one, other = (model.model.layers[0].self_attn.q_proj for model in (ours, made))
    assert one.weight is not other.weight and one.weight.packed is other.weight.packed
    before = ours(IDS).logits
    with torch.no_grad():
        other.bias.zero_()
        made.model.norm.weight.zero_()
    assert torch.equal(ours(IDS).logits, before) and apart(ours, made) > 0.1


def test_biases_learn(qwen2: Path) -> None:
    found = []
    for model in both(qwen2):
        model(IDS, labels=IDS).loss.backward()
        found.append(model.model.layers[0].self_attn.q_proj.bias.grad)
    assert found[0].abs().max() > 0.01
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def _assign(layer: Any) -> None:
    layer.bias = torch.nn.Parameter(torch.ones(32))


def _data(layer: Any) -> None:
    layer.bias.data = torch.ones(32)


def _remove(layer: Any) -> None:
    layer.bias = None


@pytest.mark.parametrize("edit", [_assign, _data, _remove, lambda layer: layer.bias.data.add_(1)])
def test_a_bias_that_was_set_anew_is_added(edit: Any, qwen2: Path) -> None:
    found = both(qwen2)
    apart(*found)  # a product that adds the bias is made where nothing is learned, and copied
    for model in (*found, copy.deepcopy(found[0])):
        with torch.no_grad():
            before = model(IDS).logits
            edit(model.model.layers[0].self_attn.q_proj)
            assert (model(IDS).logits - before).abs().max() > 0.1
    assert apart(*found) < 1e-4


def test_another_type_is_that_of_all_parameters(qwen2: Path) -> None:
    ours, plain = both(qwen2)
    narrow = copy.deepcopy(ours).to(torch.bfloat16)
    assert {each.dtype for each in narrow.parameters()} == {torch.bfloat16}
    assert [name for name, _ in narrow.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert narrow(IDS).logits.dtype == torch.bfloat16 and apart(narrow, plain) < 0.5
    layer = ours.model.layers[0].self_attn.q_proj
    rounded = copy.deepcopy(layer).to(torch.bfloat16).float()
    inputs = torch.randn(3, 32)
    wanted = layer(inputs) - layer.bias + layer.bias.bfloat16()
    torch.testing.assert_close(rounded(inputs), wanted)
    with pytest.raises(UnsupportedError, match="compute on the CPU, not on meta"):
        ours.to("meta")


def _save(model: Any, path: Path) -> None:
    torch.save(model.state_dict(), path / "x.pt")


@pytest.mark.parametrize(
    "act",
    [
        _save,
        lambda model, path: pickle.dumps(model),
        lambda model, path: torch.save(model, io.BytesIO()),
        lambda model, path: model.save_pretrained(path),
        lambda model, path: model.state_dict()["lm_head.weight"] + 1,
        lambda model, path: torch.zeros(96, 32).copy_(model.state_dict()["lm_head.weight"]),
    ],
)
def test_what_would_save_it_without_weights_is_refused(act: Any, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"(proj|head|model).* is on the kernels, .* reference=True"):
        act(lowbit.load(llama), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def _set(weight: Any) -> None:
    weight.data[0] = 1


@pytest.mark.parametrize(
    "act",
    [
        _set,
        lambda weight: weight.data.add_(1),
        lambda weight: setattr(weight, "data", torch.zeros(48, 32)),
        lambda weight: torch.add(torch.ones(48, 32), 1, out=weight),
        lambda weight: weight.requires_grad_(),
    ],
)
def test_packed_weights_do_not_change(act: Any, llama: Path) -> None:
    weight = lowbit.load(llama).model.layers[0].mlp.up_proj.weight
    assert not weight.requires_grad_(requires_grad=False).requires_grad
    with torch.no_grad(), pytest.raises(UnsupportedError, match="weights on the kernels do not change"):
        act(weight)


def test_there_is_no_memory_to_be_read_past_torch(llama: Path) -> None:
    """Code outside of `torch` that takes the address would read at zero."""
    weight = lowbit.load(llama, exact=True).model.layers[0].mlp.up_proj.weight
    for take in (torch._C._to_dlpack, torch.Tensor.data_ptr):
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            take(weight)
    assert (np.from_dlpack(weight) == weight.tolist()).all() and torch.equal(weight.view(-1), weight.flatten())


def test_another_default_type_of_torch_changes_nothing(qwen2: Path, tmp_path: Path) -> None:
    before, wanted = torch.get_default_dtype(), lowbit.load(qwen2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert apart(lowbit.load(qwen2), wanted) == 0
        lowbit.quantize(qwen2.parent / "m", tmp_path / "q", scheme="int4-g16", method="rtn")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    file = "model.safetensors"
    assert (tmp_path / "q" / file).read_bytes() == (qwen2 / file).read_bytes()


def test_a_weight_that_is_set_is_multiplied(llama: Path) -> None:
    ours, plain = both(llama)
    assert ours.load_state_dict(copy.deepcopy(ours.state_dict())).missing_keys == []
    with pytest.raises(RuntimeError, match="weights on the kernels do not change"):
        ours.load_state_dict(plain.state_dict())
    assert isinstance(ours.lm_head.weight, PackedWeight)
    ours.load_state_dict(plain.state_dict(), assign=True)
    assert apart(ours, plain) == 0 and "in_features=32" in repr(ours)
    assert ours.to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16


def test_a_weight_of_another_layer_is_multiplied(qwen2: Path) -> None:
    """Also where a product with the bias was made of the one before."""
    found = both(qwen2)
    apart(*found)
    for model in found:
        attention = model.model.layers[0].self_attn
        attention.k_proj.weight = attention.v_proj.weight
    assert apart(*found) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow_and_shrink(tied: bool, tmp_path: Path) -> None:
    path = quantized("llama", tmp_path, tie_word_embeddings=tied)
    for size in (100, 90):
        ours, plain = both(path)
        for model in (ours, plain):
            model.resize_token_embeddings(size)
        assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) is tied
        difference = (ours(IDS).logits - plain(IDS).logits)[..., :90]
        assert ours(IDS).logits.shape[-1] == size and difference.abs().max() < 1e-4


def test_it_goes_through_the_compiler(qwen2: Path) -> None:
    """In a process of its own: what checks annotations here cannot be compiled."""
    code = """
import sys, torch, lowbit
ours, ids = lowbit.load(sys.argv[1]), torch.arange(6)[None]
assert torch.equal(torch.compile(ours, backend="eager")(ids).logits, ours(ids).logits)
"""
    done = subprocess.run([sys.executable, "-c", code, qwen2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "target"), [("qwen2", ["q_proj", "v_proj"]), ("llama", "all-linear"), ("gpt2", ["c_attn"])]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what peft calls
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # of a class of GPT-2 that the kernels replace
def test_adapters_of_peft_are_trained_saved_and_opened(kind: str, target: Any, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    path = quantized(kind, tmp_path)
    losses, found = [], []
    for model in both(path):
        torch.manual_seed(0)
        found.append(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM")))
        losses.append(train(found[-1]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and losses[0][-1] < losses[0][0] - 0.2
    found[0].save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(path)
    assert apart(peft.PeftModel.from_pretrained(lowbit.load(path, exact=True), tmp_path / "a"), found[0]) == 0
    assert isinstance(next(m for m in found[0].modules() if isinstance(m, Linear)).weight, PackedWeight)
    with pytest.raises(UnsupportedError, match="merging an adapter"):
        found[0].merge_and_unload()


def train(model: Any) -> list[float]:
    """Losses of three steps."""
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_layers_that_say_linear_in_their_own_words_are_on_the_kernels(tmp_path: Path) -> None:
    path = quantized("falcon", tmp_path)
    found = open_model(path, exact=True)
    assert not found.others and any(name.endswith("self_attention.dense.weight") for name in found.kernels)
    assert apart(found.model, lowbit.load(path, reference=True)) < 1e-4


def test_what_is_not_on_the_kernels_says_why(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "m")
    lowbit.quantize(tmp_path / "m", tmp_path / "q", scheme="int4-g16", method="rtn", sets="embed_tokens=int8-g16")
    why = open_model(tmp_path / "q").others
    assert why.pop("model.embed_tokens.weight") == "its rows are looked up, not multiplied"
    assert len(why) == 24 and {*why.values()} == {"the model joins it with others"}


def test_classes_that_do_more_than_multiply_are_none() -> None:
    class Wide(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs)

    class Clamped(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return (inputs @ self.weight.T).clamp(-1e4, 1e4) + (0 if self.bias is None else self.bias)

    class Grouped(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.view(self.in_features, -1) @ self.weight.T

    class Own(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found = inputs @ self.weight.T
            return found if self.bias is None else found + self.bias

    class Unbiased(torch.nn.Linear):  # right without a bias alone; the next with one alone
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs @ self.weight.T

    class Doubled(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * inputs @ self.weight.T if self.bias is None else inputs @ self.weight.T + self.bias

    assert not is_linear(Unbiased) and not is_linear(Doubled)
    before = torch.get_rng_state()
    assert [is_linear(kind) for kind in (torch.nn.Linear, Own, Clamped, Grouped, Wide)] == [True, True, *[False] * 3]
    assert torch.equal(torch.get_rng_state(), before)
