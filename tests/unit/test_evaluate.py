"""Evaluation: the model that is run, the protocol, the statistics, and what is said when it cannot be done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import exp, isinf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lowbit.budget import anonymous_bytes
from lowbit.cli import group
from lowbit.errors import CheckpointError, LowbitError, ResourceError, UsageError
from lowbit.metrics import Score
from lowbit.metrics._blocks import Blocks, make_blocks
from lowbit.metrics.kl import METRIC as KL
from lowbit.stages._model import open_blueprint
from lowbit.stages.checkpoint import open_checkpoint
from lowbit.stages.evaluate import Evaluation, Text, Way, evaluate
from tests.reference.evaluate import CONFIGS, TEXT, expected, load, token_ids, write_model, write_tokenizer

SAMPLE = Text("sample", TEXT)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny models, written on first use."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str, seed: int = 0) -> Path:
        path = root / f"{name}-{seed}"
        return path if path.exists() else write_model(path, name, seed)

    return get


@pytest.fixture
def broken(made: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a model, to break."""
    return Path(shutil.copytree(made("llama"), tmp_path / "broken"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Store all tensors in one file, after a change."""
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in path.glob("model*"):
        file.unlink()
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


# The model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_computes_what_transformers_computes(made: Callable[..., Path], name: str, way: str) -> None:
    path = made(name)
    model = getattr(open_blueprint(open_checkpoint(path), torch.float32), way)()
    ids = torch.tensor([token_ids(path, TEXT)[:48], token_ids(path, TEXT)[48:96]])
    with torch.inference_mode():
        found = [model(input_ids=ids, use_cache=False).logits for _ in range(2)]
        wanted = load(path)(input_ids=ids, use_cache=False).logits
    assert wanted.std() > 0.5, "weights so small that a missing one would not be seen"
    for logits in found:
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_streamed_model_holds_no_block_between_passes(made: Callable[..., Path], name: str) -> None:
    blueprint = open_blueprint(open_checkpoint(made(name)), torch.float32)
    model = blueprint.streamed()
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64))
    held = sum(tensor.untyped_storage().nbytes() for tensor in model.parameters())
    assert held <= 4 * 32 * 8
    assert blueprint.streamed_bytes < blueprint.resident_bytes


def test_a_streamed_model_is_empty_also_after_a_failure(made: Callable[..., Path]) -> None:
    model: Any = open_blueprint(open_checkpoint(made("llama")), torch.float32).streamed()
    with torch.inference_mode(), pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert model.get_input_embeddings().weight.untyped_storage().nbytes() == 4


def test_tied_weights_stay_one(made: Callable[..., Path]) -> None:
    model: Any = open_blueprint(open_checkpoint(made("qwen2")), torch.float32).resident()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_bytes_of_a_resident_model_are_those_of_its_parameters(made: Callable[..., Path]) -> None:
    for name in ("llama", "llama-tied"):
        blueprint = open_blueprint(open_checkpoint(made(name)), torch.float32)
        assert blueprint.resident_bytes == sum(4 * tensor.numel() for tensor in load(made(name)).parameters())


# The protocol


@pytest.mark.parametrize(
    ("name", "context", "stride", "batch"),
    [("llama", 32, 32, None), ("llama", 32, 8, 3), ("llama", 33, 32, 7), ("gpt2", 64, 64, 1), ("mixtral", 40, 17, 2)],
)
def test_scores_equal_plain_loops(
    made: Callable[..., Path], name: str, context: int, stride: int, batch: int | None
) -> None:
    path, other = made(name), made(name, 1)
    found = evaluate(path, SAMPLE, reference=other, context=context, stride=stride, batch=batch)
    wanted = expected(load(path), load(other), token_ids(path, TEXT), context, stride)
    assert found.conditions.scored == wanted.scored
    quantiles = wanted.kl.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64))
    values = {name: score.value for name, score in found.scores.items()}
    assert values == pytest.approx(
        {
            "perplexity": wanted.perplexity,
            "reference_perplexity": values["perplexity"] / exp(values["log_perplexity_change"]),
            "log_perplexity_change": values["log_perplexity_change"],
            "kl_mean": float(wanted.kl.mean()),
            "kl_median": float(quantiles[0]),
            "kl_p99": float(quantiles[1]),
            "top1_agreement": wanted.agreement,
        },
        rel=1e-5,
    )
    alone = evaluate(other, SAMPLE, context=context, stride=stride)
    assert set(alone.scores) == {"perplexity"}
    assert alone.scores["perplexity"].value == pytest.approx(values["reference_perplexity"], rel=1e-6)


def test_a_model_against_itself_does_not_differ(made: Callable[..., Path]) -> None:
    found = evaluate(made("llama"), SAMPLE, reference=made("llama"), context=32)
    for name in ("kl_mean", "kl_median", "kl_p99", "log_perplexity_change"):
        assert found.scores[name].value == 0
    assert found.scores["log_perplexity_change"].p_value == 1
    assert found.scores["top1_agreement"] == Score(1.0, 1.0, 1.0)


def test_where_there_is_no_interval_the_conditions_say_why(made: Callable[..., Path]) -> None:
    few, enough = (str(evaluate(made("llama"), SAMPLE, context=32, tokens=32 * n).conditions) for n in (2, 8))
    assert "no intervals, for which 5 windows are needed" in few and "95%" not in few
    assert "95% intervals over 8 blocks" in enough


def test_conditions_say_what_was_done(made: Callable[..., Path]) -> None:
    found = evaluate(made("llama"), SAMPLE, context=32, stride=20, tokens=300, seed=3).conditions
    assert (found.windows, found.tokens, found.scored) == (14, 292, 31 + 13 * 20)
    assert (found.context, found.stride, found.seed, found.dtype, found.special) == (32, 20, 3, "float32", ("<s>",))
    assert found.sha256 == SAMPLE.sha256
    for part in ("sample", "context 32", "stride 20", "292 tokens", "14 windows", "<s> once", "float32"):
        assert part in str(found)


def test_a_limit_on_tokens_is_the_beginning_of_the_whole(made: Callable[..., Path]) -> None:
    limited = evaluate(made("llama"), SAMPLE, context=32, tokens=129)
    ids = token_ids(made("llama"), TEXT)[:129]
    model = load(made("llama"))
    assert limited.scores["perplexity"].value == pytest.approx(expected(model, model, ids, 32, 32).perplexity, rel=1e-6)


def test_a_limit_on_tokens_reads_on_where_tokens_are_long(broken: Path) -> None:
    """A token of 300 characters: what was cut off at first is needed."""
    make: Any = transformers.PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=Tokenizer(models.WordLevel({"x" * 300: 1, "?": 0}, unk_token="?")))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(broken)
    text = Text("long words", " ".join(["x" * 300] * 200))
    assert evaluate(broken, text, context=32, tokens=150).conditions.tokens == 128


def test_the_same_call_gives_the_same_numbers(made: Callable[..., Path]) -> None:
    runs = [evaluate(made("llama"), SAMPLE, reference=made("llama", 1), context=32).to_dict() for _ in range(2)]
    assert json.dumps(runs[0]) == json.dumps(runs[1])
    other = evaluate(made("llama"), SAMPLE, reference=made("llama", 1), context=32, seed=1).to_dict()
    assert other["scores"]["kl_mean"]["value"] == runs[0]["scores"]["kl_mean"]["value"]
    assert other["scores"]["kl_mean"]["low"] != runs[0]["scores"]["kl_mean"]["low"]


def test_threads_of_torch_are_put_back(made: Callable[..., Path]) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    evaluate(
        made("llama"), SAMPLE, context=32, threads=before + 1, progress=lambda *_: seen.append(torch.get_num_threads())
    )
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_line_ends_of_a_file_are_kept(made: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.replace("\n", "\r\n").encode())
    found = evaluate(made("llama"), file, context=32)
    assert found.conditions.sha256 == Text("", TEXT.replace("\n", "\r\n")).sha256


def test_a_token_that_the_reference_rules_out_adds_no_divergence() -> None:
    reference = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    model = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log()
    found = KL.score(model, reference, torch.tensor([0]))["kl"]
    assert found.item() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_values_beyond_floats_are_null_in_json(made: Callable[..., Path]) -> None:
    found = evaluate(made("llama"), SAMPLE, context=32)
    destroyed = Evaluation("m", None, found.conditions, {"perplexity": Score(float("inf"), 1.0, float("nan"))})
    assert json.loads(json.dumps(destroyed.to_dict()))["scores"]["perplexity"] == {
        "value": None, "low": 1.0, "high": None, "p_value": None,
    }  # fmt: skip


def test_the_perplexity_of_a_destroyed_model_is_infinite() -> None:
    from lowbit.metrics.perplexity import METRIC

    scores = METRIC.summarise({"nll": np.full(64, 1e4)}, make_blocks([8] * 8))
    assert isinf(scores["perplexity"].value)


# The statistics


def windows_of(rng: np.random.Generator, count: int, tokens: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Values with mean 0 whose windows are alike and resemble the ones before them, as topics of a text make them."""
    level = np.zeros(count + 20)
    for n in range(1, len(level)):
        level[n] = 0.3 * level[n - 1] + rng.standard_normal()
    return (level[20:, None] + rng.standard_normal((count, tokens))).ravel()


@pytest.mark.parametrize("count", [16, 100])
def test_intervals_hold_the_truth_as_often_as_they_say(count: int) -> None:
    rng, tokens = np.random.default_rng(count), 4
    blocks = make_blocks([tokens] * count)
    scores = [blocks.mean(windows_of(rng, count, tokens)) for _ in range(250)]
    share = np.mean(
        [score.low <= 0 <= score.high for score in scores if score.low is not None and score.high is not None]
    )
    assert 0.88 <= share <= 0.99


def test_p_values_are_uniform_where_nothing_changed() -> None:
    rng = np.random.default_rng(0)
    blocks = make_blocks([4] * 64)
    values = np.array([blocks.change(windows_of(rng, 64, 4)).p_value for _ in range(150)])
    for level in (0.05, 0.25, 0.5, 0.75):
        assert abs(np.mean(values <= level) - level) < 4 * np.sqrt(level * (1 - level) / 150) + 0.02


def test_a_change_is_found() -> None:
    values = windows_of(np.random.default_rng(0), 200, 4)
    assert make_blocks([4] * 200).change(values + 1).p_value == pytest.approx(2 / 10_000, abs=2e-4)


def test_means_weigh_tokens_not_windows() -> None:
    counts = [9] * 80 + [1] * 80
    values = np.concatenate([np.full(count, float(count)) for count in counts])
    score = make_blocks(counts).mean(values)
    assert score.value == pytest.approx((80 * 9 * 9 + 80) / 800)
    assert score.low is not None and score.high is not None and score.low < score.value < score.high


@pytest.mark.parametrize(("windows", "blocks"), [(1, 1), (7, 7), (8, 8), (16, 8), (64, 16), (1000, 100)])
def test_blocks_are_runs_of_windows(windows: int, blocks: int) -> None:
    made = make_blocks([3] * windows)
    assert len(made.starts) == blocks
    assert set(np.diff(made.starts)) <= {3 * (windows // blocks), 3 * -(-windows // blocks)}


def test_too_few_windows_have_no_interval() -> None:
    blocks = make_blocks([4] * 4)
    assert blocks.change(np.arange(16.0)) == Score(7.5)
    assert isinstance(blocks, Blocks)


# What cannot be done


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (Text("void", ""), "void is empty"),
        (Text("short", "abc"), r"short gives 4 tokens, fewer than one window of 32"),
        ("missing.txt", "missing.txt cannot be read: No such file"),
        (".", r"the text \. cannot be read"),
    ],
)
def test_texts_that_cannot_be_used(made: Callable[..., Path], text: Text | str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        evaluate(made("llama"), text, context=32)


def test_a_text_that_is_not_utf8(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin.txt is not UTF-8: byte 0xf6 at offset 2"):
        evaluate(made("llama"), tmp_path / "latin.txt", context=32)


@pytest.mark.parametrize(
    ("context", "stride", "says"),
    [
        (65, None, "takes 64 tokens at most"),
        (1, None, "at least 2"),
        (32, 33, "stride from 1"),
        (32, 0, "stride from 1"),
    ],
)
def test_windows_that_cannot_be_cut(made: Callable[..., Path], context: int, stride: int | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        evaluate(made("llama"), SAMPLE, context=context, stride=stride)


def test_a_reference_that_splits_text_otherwise(made: Callable[..., Path], broken: Path) -> None:
    write_tokenizer(broken, reverse=True)
    with pytest.raises(UsageError, match="into other tokens"):
        evaluate(made("llama"), SAMPLE, reference=broken, context=32)


def test_a_reference_with_another_vocabulary(made: Callable[..., Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", "gpt2")
    config = json.loads((other / "config.json").read_text())
    rewrite(other, lambda tensors: tensors.update({"transformer.wte.weight": torch.zeros(270, 32)}))
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 270}))
    with pytest.raises(UsageError, match=r"vocabularies differ, 270 in .* and 260 in"):
        evaluate(made("llama"), SAMPLE, reference=other, context=32)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(NORM), f"1 weights are missing, as '{NORM}'"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "1 weights have no place in the model, as 'extra'"),
        (lambda tensors: tensors.update({NORM: torch.zeros(5)}), f"1 weights have another shape, as '{NORM}'"),
        (lambda tensors: tensors[NORM].fill_(torch.nan), "model computes values that are not finite .*windows 0 to"),
    ],
)
def test_weights_that_cannot_be_used(
    broken: Path, change: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    rewrite(broken, change)
    with pytest.raises(CheckpointError, match=says):
        evaluate(broken, SAMPLE, context=32)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "has no config.json"),
        ({}, "is no causal language model"),
        ({"model_type": "no-such-model"}, "is no causal language model: .*no-such-model"),
        ({"model_type": "t5"}, "is no causal language model"),
    ],
)
def test_configurations_that_cannot_be_used(broken: Path, config: dict[str, str] | None, says: str) -> None:
    (broken / "config.json").unlink()
    if config is not None:
        (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says) as caught:
        evaluate(broken, SAMPLE, context=32)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_tokenizer(broken: Path) -> None:
    for file in broken.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        evaluate(broken, SAMPLE, context=32)


def test_code_of_a_checkpoint_is_not_run_unasked(broken: Path) -> None:
    (broken / "evil.py").write_text(f"open({str(broken / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (broken / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(UsageError, match="--trust-remote-code"):
        evaluate(broken, SAMPLE, context=32)
    assert not (broken / "ran").exists()


def test_too_little_memory_is_refused_with_what_is_enough(made: Callable[..., Path]) -> None:
    with pytest.raises(ResourceError, match=r"--ram 64 MiB is too little: this evaluation needs at least .*iB"):
        evaluate(made("llama"), SAMPLE, context=32, ram=2**26)


def test_a_text_too_long_for_the_limit_is_refused_before_it_is_split(made: Callable[..., Path]) -> None:
    text, ram = Text("long", TEXT * 5000), anonymous_bytes() + 2**28
    with pytest.raises(ResourceError, match=r"splitting long into tokens takes up to .*--tokens"):
        evaluate(made("llama"), text, context=32, ram=ram)
    assert evaluate(made("llama"), text, context=32, ram=ram, tokens=64).conditions.windows == 2


# The memory


CHILD = """
import sys
from lowbit.budget import MemoryWatch
from lowbit.errors import ResourceError
from lowbit.stages.evaluate import Text, evaluate

path, ways, text = sys.argv[1], [], Text("sample", sys.argv[2])
watch = MemoryWatch(None)
with watch.running():
    try:
        evaluate(path, text, reference=path, context=64, ram=2**20)
    except ResourceError as error:
        least = float(str(error).partition("at least ")[2].split()[0]) * 2**20
    evaluate(path, text, reference=path, context=64, ram=int(least * 1.02), announce=ways.append, threads=1)
print(int(least), watch.peak, ways[0].total, ways[0].streamed)
"""


def test_a_streamed_evaluation_stays_within_its_limit(tmp_path: Path) -> None:
    """Two models of 170 MB each, a block of 21 MB at a time: the least that is asked for is enough, and kept."""
    write_large(tmp_path)
    arguments = [sys.executable, "-c", CHILD, str(tmp_path), TEXT[:400]]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    least, peak, total, streamed = map(int, done.stdout.split())
    assert streamed == 2
    assert peak <= total <= least * 1.02
    assert total < peak + 200 * 2**20, "the estimate is far above what is needed"


def write_large(path: Path) -> None:
    """The tiny Llama, wider: 8 blocks of 5 million parameters, in bfloat16."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=640, intermediate_size=1792, num_hidden_layers=8, num_attention_heads=8, vocab_size=260,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    write_tokenizer(path)


def test_the_fastest_way_that_fits_is_taken(made: Callable[..., Path]) -> None:
    from lowbit.stages.evaluate import evaluation_bytes, plan_evaluation

    blueprints = [open_blueprint(open_checkpoint(made("llama", seed)), torch.float32) for seed in (0, 1)]
    free = plan_evaluation(blueprints, 64, 100, None, None)
    assert (free.resident, free.streamed, free.batch) == (2, 0, 32)
    assert free.work == evaluation_bytes(blueprints, 2, 64, 100, 32)
    assert plan_evaluation(blueprints, 64, 5, None, None).batch == 5
    assert plan_evaluation(blueprints, 64, 100, 7, None).batch == 7
    sizes = [evaluation_bytes(blueprints, resident, 64, 100, 1) for resident in range(3)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2]


# The command


def test_the_command_prints_a_table(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["evaluate", str(made("llama")), "--text", str(tmp_path / "text.txt"), "--context", "32"]
    done = CliRunner().invoke(group, [*arguments, "--reference", str(made("llama", 1))])
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    for part in (
        "perplexity",
        "kl mean",
        "kl p99",
        "top1 agreement",
        "log perplexity change",
        "context 32",
        "stride 32",
    ):
        assert part in words


def test_the_command_prints_one_json_document(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = [
        "--text",
        str(tmp_path / "text.txt"),
        "--context",
        "32",
        "--tokens",
        "200",
        "--ram",
        "100GiB",
        "--json",
    ]
    done = CliRunner().invoke(group, ["evaluate", str(made("llama")), *arguments])
    assert done.exit_code == 0, done.output
    wanted = evaluate(made("llama"), tmp_path / "text.txt", context=32, tokens=200, ram=100 * 2**30).to_dict()
    assert json.loads(done.stdout) == wanted


def test_the_command_raises_sentences(made: Callable[..., Path]) -> None:
    done = CliRunner().invoke(group, ["evaluate", str(made("llama")), "--text", "missing.txt"])
    assert isinstance(done.exception, LowbitError)
    done = CliRunner().invoke(group, ["evaluate", str(made("llama")), "--text", "x", "--ram", "lots"])
    assert done.exit_code != 0


def test_a_way_says_how_it_works() -> None:
    text = str(Way(1, 1, 4, 2**30, 2**31))
    assert "3 GiB" in text and "4 windows a pass" in text and "1 of 2 models streamed" in text
