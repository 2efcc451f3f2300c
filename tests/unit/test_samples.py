"""Calibration windows from files, chats and datasets, and the measure of whether they are enough and alike."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowbit.errors import UsageError
from lowbit.stages._windows import Text, encode
from lowbit.stages.checkpoint import Checkpoint, open_checkpoint
from lowbit.stages.samples import Samples, Sampling, parse_sources, read_samples, similarity

WORDS = 4000
BOS, EOS, UNKNOWN = WORDS, WORDS + 1, WORDS + 2
CHAT = "{% for m in messages %}<b> {{ m.role }} {{ m.content }} {% endfor %}"


def save_tokenizer(folder: Path, wiki_8m: Path, begins: bool) -> Checkpoint:
    """A checkpoint whose tokenizer gives word `n` the number n, and adds a first token or nothing at all."""
    folder.mkdir()
    (folder / "config.json").write_bytes((wiki_8m / "config.json").read_bytes())
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    words = {str(n): n for n in range(WORDS)} | {"<b>": BOS, "<e>": EOS, "?": UNKNOWN}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if begins:
        tokenizer.post_processor = TemplateProcessing(single="<b> $A", special_tokens=[("<b>", BOS)])
    make: Any = PreTrainedTokenizerFast
    kept = make(tokenizer_object=tokenizer, bos_token="<b>", eos_token="<e>", unk_token="?")
    kept.chat_template = CHAT if begins else None
    kept.save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.fixture
def model(tmp_path: Path, wiki_8m: Path) -> Checkpoint:
    return save_tokenizer(tmp_path / "model", wiki_8m, begins=True)


@pytest.fixture
def bare(tmp_path: Path, wiki_8m: Path) -> Checkpoint:
    return save_tokenizer(tmp_path / "bare", wiki_8m, begins=False)


def numbers(start: int, stop: int, ends: str = " ") -> str:
    return ends.join(map(str, range(start, stop)))


def save_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_windows_of_a_file_are_runs_of_its_tokens_that_do_not_overlap(tmp_path: Path, model: Checkpoint) -> None:
    (tmp_path / "a.txt").write_text(numbers(0, WORDS))
    seen = [read_samples(tmp_path / "a.txt", model, samples=50, length=64, seed=seed) for seed in (0, 0, 1)]
    for found in seen:
        assert found.ids.shape == (50, 64) and found.warnings == ()
        inner = found.ids[found.ids[:, 0] != BOS]
        assert len(inner) >= 49 and (inner.diff(dim=1) == 1).all()
        starts = found.ids[:, 1].sort().values
        assert (starts.diff() >= 64).all() and (starts.diff() > 64).any()
        assert (found.ids[:, 1].diff() < 0).any()  # the order is shuffled: the last windows are no end of the text
    assert torch.equal(seen[0].ids, seen[1].ids) and seen[0].sha256 == seen[1].sha256
    assert not torch.equal(seen[0].ids, seen[2].ids) and seen[0].sha256 != seen[2].sha256


def test_every_offset_is_as_likely_as_others(tmp_path: Path, model: Checkpoint) -> None:
    (tmp_path / "a.txt").write_text(numbers(0, 9))
    found = [read_samples(tmp_path / "a.txt", model, samples=2, length=4, seed=seed) for seed in range(60)]
    starts = Counter(tuple(sorted(int(n) for n in each.ids[:, 1])) for each in found)
    assert starts.keys() == {(0, 4), (0, 5), (0, 6), (1, 5), (1, 6), (2, 6)}
    assert max(starts.values()) < 30


def test_first_windows_are_what_the_tokenizer_gives(wiki_8m: Path) -> None:
    text = wiki_8m.parent / "evaluation.txt"
    found = read_samples(text, open_checkpoint(wiki_8m), samples=3, length=100, sampling="first")
    expected = AutoTokenizer.from_pretrained(wiki_8m)(text.read_bytes().decode(), verbose=False)["input_ids"]
    assert found.ids.flatten().tolist() == expected[:300]
    assert found.special == ("<s>",)
    assert found.sources[0].sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert found.sources[0].tokens == len(expected)
    raw = b"".join(int(n).to_bytes(8, "little") for n in expected[:300])
    assert found.to_dict()["sha256"] == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("field", ["text", "body"])
def test_documents_begin_as_the_tokenizer_begins_them(tmp_path: Path, model: Checkpoint, field: str) -> None:
    path = save_lines(tmp_path / "a.jsonl", [{field: numbers(10 * n, 10 * n + 7)} for n in range(6)])
    source = str(path) if field == "text" else f"{path}:{field}"
    found = read_samples(source, model, samples=6, length=8, sampling="first")
    assert found.ids.tolist() == [[BOS, *range(10 * n, 10 * n + 7)] for n in range(6)]
    assert found.sources[0].documents == 6


def test_the_end_of_a_document_is_marked_where_nothing_is_at_its_begin(tmp_path: Path, bare: Checkpoint) -> None:
    path = save_lines(tmp_path / "a.jsonl", [{"text": numbers(0, 5)}, {"text": ""}, {"text": numbers(5, 9)}])
    found = read_samples(path, bare, samples=1, length=10, sampling="first")
    assert found.ids.tolist() == [[0, 1, 2, 3, 4, EOS, 5, 6, 7, 8]]
    assert found.special == ()


def test_chats_are_written_by_the_template_which_adds_its_own_special_tokens(tmp_path: Path, model: Checkpoint) -> None:
    chat = [{"role": "1", "content": "7 8"}, {"role": "2", "content": "9"}]
    path = save_lines(tmp_path / "a.jsonl", [{"messages": chat}] * 2)
    found = read_samples(path, model, samples=2, length=7, sampling="first")
    assert found.ids.tolist() == [[BOS, 1, 7, 8, BOS, 2, 9]] * 2


def test_lines_are_shuffled(tmp_path: Path, model: Checkpoint) -> None:
    path = save_lines(tmp_path / "a.jsonl", [{"text": numbers(n, n + 15)} for n in range(1000)])
    found = read_samples(path, model, samples=4, length=16)
    assert found.sources[0].documents == 16  # enough text for a choice, and no more
    assert (found.ids == BOS).sum(1).tolist() == [1] * 4
    assert int(found.ids[found.ids < WORDS].max()) > 400


def test_a_long_line_is_one_document_among_others(tmp_path: Path, model: Checkpoint) -> None:
    path = save_lines(tmp_path / "a.jsonl", [{"text": numbers(0, WORDS)}] + [{"text": "1 2 3"}] * 500)
    found = read_samples(path, model, samples=100, length=8)
    assert 0 < ((found.ids > 3) & (found.ids != BOS)).float().mean() < 0.1


def test_length_takes_as_much_from_short_documents_as_from_long_ones(tmp_path: Path, model: Checkpoint) -> None:
    texts = [numbers(size, size + size) for size in (4, 9, 30, 60) for _ in range(40)]
    path = save_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    found = read_samples(path, model, samples=20, length=20, sampling="length")
    tokens = found.ids[found.ids != BOS]
    sizes = [int(((tokens >= size) & (tokens < 2 * size)).sum()) for size in (4, 9)]
    assert 60 <= sizes[0] <= 100 and 80 <= sizes[1] <= 100
    assert int((tokens >= 60).sum()) >= 90  # the upper half of the longest; the next ones have none of these
    few = read_samples(path, model, samples=60, length=20, sampling="length")
    assert len(few.ids) == 60  # the shortest have 10 windows, the others fill in


def save_two(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "a.txt").write_text(numbers(0, 2000))
    (tmp_path / "b.txt").write_text(numbers(2000, 2500))
    return tmp_path / "a.txt", tmp_path / "b.txt"


@pytest.mark.parametrize(
    ("weights", "shares"), [(("", ""), (10, 10)), (("@3", "@1"), (15, 5)), (("@1", "@99"), (0, 20))]
)
def test_sources_give_their_shares(
    tmp_path: Path, model: Checkpoint, weights: tuple[str, str], shares: tuple[int, int]
) -> None:
    a, b = save_two(tmp_path)
    found = read_samples(f"{a}{weights[0]},{b}{weights[1]}", model, samples=20, length=16, sampling="stratified")
    assert tuple(each.windows for each in found.sources) == shares
    last = found.ids[:, -1]
    assert (int((last < 2000).sum()), int((last >= 2000).sum())) == shares
    assert found.warnings == ()
    if shares[0]:
        assert (found.ids[: len(last) // 2, -1] >= 2000).any() and (found.ids[len(last) // 2 :, -1] < 2000).any()


def test_shares_are_rounded_without_favour(tmp_path: Path, model: Checkpoint) -> None:
    """60, 28 and 12% of six windows are 3.6, 1.7 and 0.7: Webster gives 3, 2, 1, where d'Hondt gave 4, 2, 0."""
    a, b = save_two(tmp_path)
    found = read_samples(f"{a}@60,{b}@28,{a}@12", model, samples=6, length=16)
    assert [each.windows for each in found.sources] == [3, 2, 1]


def test_what_a_source_lacks_the_others_give_and_the_user_is_told(tmp_path: Path, model: Checkpoint) -> None:
    found = read_samples(list(save_two(tmp_path)), model, samples=60, length=25)
    assert [each.windows for each in found.sources] == [40, 20]
    assert found.warnings == ("20 windows of 25 tokens came from b.txt, whose share is 30",)


def test_lengths_of_one_document_are_said_to_be_as_at_random(tmp_path: Path, model: Checkpoint) -> None:
    path = tmp_path / "one.txt"
    path.write_text(numbers(0, 400))
    found, other = (read_samples(path, model, samples=6, length=20, sampling=each) for each in ("length", "random"))
    assert found.warnings == ("one.txt is one document, of which --sampling length takes what random does",)
    assert other.warnings == () and torch.equal(found.ids, other.ids)


def test_too_little_text_gives_fewer_windows_and_a_warning(tmp_path: Path, model: Checkpoint) -> None:
    (tmp_path / "a.txt").write_text(numbers(0, 99))
    found = read_samples(tmp_path / "a.txt", model, samples=128, length=30)
    assert found.ids.shape == (3, 30)
    assert found.warnings == ("the calibration text gives 3 windows of 30 tokens, 128 were asked for",)
    one = read_samples(tmp_path / "a.txt", model, samples=2, length=99)
    assert one.warnings == ("the calibration text gives 1 window of 99 tokens, 2 were asked for",)
    with pytest.raises(UsageError, match=r"^a.txt: 100 tokens in all, fewer than one window of 101; take more text$"):
        read_samples(tmp_path / "a.txt", model, samples=128, length=101)


@pytest.mark.parametrize("ends", [" ", "\n", " é "])
def test_of_a_long_file_runs_from_everywhere_are_read(tmp_path: Path, model: Checkpoint, ends: str) -> None:
    path = tmp_path / "a.txt"
    text = numbers(1000, WORDS, ends)
    path.write_text(ends.join([text] * 200))
    found = read_samples(path, model, samples=32, length=32)
    whole = path.stat().st_size / (4 + len(ends.encode()))
    assert 4 * 32 * 32 <= found.sources[0].tokens < whole / 50
    ids = [[n for n in row if n not in (UNKNOWN, BOS)] for row in found.ids.tolist()]
    steps = Counter((b - a) % 3000 for row in ids for a, b in pairwise(row))
    assert steps[1] > 0.95 * steps.total()  # others are where one run ends
    starts = sorted(row[0] for row in ids)
    assert starts[0] < 1600 and starts[-1] > 3400
    assert read_samples(path, model, samples=32, length=32).sha256 == found.sha256
    first = read_samples(path, model, samples=4, length=16, sampling="first")
    assert first.ids[0, :3].tolist() == [BOS, 1000, 1001 if ends != " é " else UNKNOWN]


def test_of_a_long_file_of_lines_some_are_read(tmp_path: Path, model: Checkpoint) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for n in range(0, WORDS, 10):
            file.write(json.dumps({"text": numbers(n, n + 9), "filler": "x" * 180_000}) + "\n")
    assert path.stat().st_size > 2**26
    found = read_samples(path, model, samples=8, length=16)
    begins = found.ids[:, 1:][found.ids[:, :-1] == BOS]
    assert 45 <= found.sources[0].documents <= 60 and len(set(begins.tolist())) == len(begins)
    assert int(begins.min()) < 1200 and int(begins.max()) > 2800
    everything = read_samples(path, model, samples=2000, length=16)
    assert 390 <= everything.sources[0].documents <= 400  # each line once, and hardly one is missed


def dataset_folder(path: Path) -> str:
    path.mkdir()
    save_lines(path / "train.jsonl", [{"text": numbers(n, n + 15), "other": "7"} for n in range(300)])
    save_lines(path / "test.jsonl", [{"text": numbers(n, n + 15), "other": "7"} for n in range(1000, 1030)])
    return str(path)


@pytest.mark.filterwarnings("default")  # of the package
def test_datasets(tmp_path: Path, model: Checkpoint) -> None:
    datasets = pytest.importorskip("datasets")
    folder = dataset_folder(tmp_path / "data")
    train = read_samples(f"hf:{folder}", model, samples=4, length=16)
    test, other = (
        read_samples(f"hf:{folder}::test{field}", model, samples=4, length=16, sampling="first")
        for field in ("", ":other")
    )
    assert train.ids.shape == (4, 16) and int(train.ids[train.ids < WORDS].max()) < 320
    assert (train.ids == BOS).sum(1).tolist() == [1] * 4 and train.sources[0].documents == 16
    assert test.ids.tolist() == [[BOS, *range(n, n + 15)] for n in range(1000, 1004)]
    assert other.ids.flatten().tolist() == [BOS, 7] * 24 and len(other.warnings) == 1
    saved = datasets.Dataset.from_list([{"text": numbers(n, n + 15)} for n in range(8)])
    saved.save_to_disk(tmp_path / "saved")
    again = read_samples(f"hf:{tmp_path / 'saved'}", model, samples=2, length=16, sampling="first")
    assert again.ids.tolist() == [[BOS, *range(n, n + 15)] for n in range(2)]
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(f"hf:{folder}::nothing", model)


def test_without_the_package_a_dataset_says_what_to_install(
    tmp_path: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the package datasets; install it with: pip install"):
        read_samples("hf:some/name", model)


def test_sources_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = parse_sources("a.txt@2.5,b.jsonl:body,hf:x/y:c::z@3,hf:w,d.jsonl")
    assert [(s.name, s.dataset, s.config, s.split, s.field, s.weight) for s in found] == [
        ("a.txt", False, "", "train", "", 2.5),
        ("b.jsonl", False, "", "train", "body", 1.0),
        ("x/y", True, "c", "train", "z", 3.0),
        ("w", True, "", "train", "", 1.0),
        ("d.jsonl", False, "", "train", "", 1.0),
    ]
    (tmp_path / "a,b@3").write_text("x")
    assert [(s.name, s.weight) for s in parse_sources("a,b@3")] == [("a,b@3", 1.0)]
    for wrong in ("", "a.txt,", "a.txt@0", "hf:", "hf:a:b:c:d:e"):
        with pytest.raises(UsageError):
            parse_sources(wrong)


@pytest.mark.parametrize("weight", ["-1", "abc", "0", "inf", ""])
def test_a_wrong_weight_is_called_one(weight: str) -> None:
    with pytest.raises(UsageError, match=rf"^x\.jsonl: its weight is '{weight}'"):
        parse_sources(f"x.jsonl@{weight}")
    assert parse_sources("a@b/c.txt")[0].name == "a@b/c.txt"  # no weight, but a name that is not there


ChangeFile = Callable[[Path], object]
WRONG: dict[str, tuple[str, ChangeFile, str]] = {
    "missing": ("a.txt", lambda path: None, "there is no text file"),
    "folder": ("a", lambda path: path.mkdir(), "is a folder, no text file; name a file in it, or hf:"),
    "not UTF-8": ("a.txt", lambda path: path.write_bytes(b"good \xff bad"), "not UTF-8: byte 0xff at offset 5"),
    "cut": ("a.txt", lambda path: path.write_bytes("good é".encode()[:-1]), "not UTF-8: byte 0xc3 at offset 5"),
    "far": ("a.txt", lambda path: path.write_bytes(b"1 " * 2**20 + b"\xff"), "not UTF-8: byte 0xff at offset 2097152"),
    "no JSON": ("a.jsonl", lambda path: path.write_text('{"text": "1"}\n{"tex'), "at offset 14 is no line of JSON"),
    "no field": (
        "a.jsonl",
        lambda path: path.write_text('{"a": "1", "b": 2}'),
        "no field text or messages, but 'a'",
    ),
    "no text": ("a.jsonl", lambda path: path.write_text('{"text": 5}'), "the field text holds int"),
    "no record": ("a.jsonl", lambda path: path.write_text("[1, 2]"), "no field text or messages, but no fields"),
    "no chat": ("a.jsonl", lambda path: path.write_text('{"messages": [{"a": 1}]}'), "no chat template"),
    "a list": ("a.json", lambda path: path.write_text('[{"text": "1"}]'), "is JSON; .* name the file NAME.jsonl"),
    "a table": ("a.parquet", lambda path: path.write_bytes(b"PAR1"), "is a table of a dataset; .* as hf:"),
    "packed": ("a.jsonl.gz", lambda path: path.write_bytes(b"\x1f\x8b"), "is packed; unpack it"),
    "empty": ("a.txt", lambda path: path.write_text(""), "0 tokens in all"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, bare: Checkpoint, case: str) -> None:
    name, make, message = WRONG[case]
    make(tmp_path / name)
    with pytest.raises(UsageError, match=message):
        read_samples(tmp_path / name, bare, samples=10_000 if case == "far" else 4, length=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "at least 1 window"),
        ({"length": 1}, "at least 1 window of 2 tokens"),
        ({"sampling": "stratified"}, "name more than one"),
    ],
)
def test_impossible_wishes(tmp_path: Path, model: Checkpoint, options: dict[str, Any], message: str) -> None:
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(UsageError, match=message):
        read_samples(tmp_path / "a.txt", model, **options)


def reference_divergence(one: list[int], other: list[int]) -> float:
    """Entropy of the mixture less the mean entropy, which is Jensen and Shannon's own form."""

    def entropy(p: dict[int, float]) -> float:
        return -sum(x * math.log2(x) for x in p.values() if x)

    first, second = ({k: n / len(ids) for k, n in Counter(ids).items()} for ids in (one, other))
    mixed = {key: (first.get(key, 0) + second.get(key, 0)) / 2 for key in first.keys() | second.keys()}
    return entropy(mixed) - (entropy(first) + entropy(second)) / 2


def test_similarity_by_definition() -> None:
    """Windows that are all alike, so that every choice of halves gives the same."""
    window, text = [1, 2, 2, 3], [2, 3, 3, 9]
    found = similarity(torch.tensor([window] * 6), torch.tensor(text * 10), 10)
    assert found.noise == 0
    assert found.excess == pytest.approx(reference_divergence(window, text))
    assert found.missing == 0.25 and found.unseen == 0
    lonely = similarity(torch.tensor([[1, 2, 2, 3], [4, 4, 5, 5]]), torch.tensor(text * 2), 10)
    assert lonely.unseen == 0.25 and lonely.noise == 1


@pytest.mark.parametrize("width", [2000, 30])
def test_same_kind_of_text_is_never_unlike_however_small(width: int) -> None:
    dice = torch.Generator().manual_seed(0)
    chances = 1 / torch.arange(1, width + 1, dtype=torch.float64)
    for windows in (2, 5, 40):
        drawn = torch.multinomial(chances, (windows + 300) * 64, replacement=True, generator=dice).view(-1, 64)
        found = similarity(drawn[:windows], drawn[windows:].flatten(), width)
        assert not found.unlike and found.excess is not None and abs(found.excess) < 0.05
    other = torch.multinomial(chances.flip(0), 40 * 64, replacement=True, generator=dice).view(-1, 64)
    assert similarity(other, drawn.flatten(), width).unlike


def of(shared: Path, name: str, samples: int, sampling: Sampling = "random") -> Samples:
    checkpoint = open_checkpoint(shared / "models" / "wiki-8m")
    return read_samples(shared / "data" / f"{name}.txt", checkpoint, samples=samples, length=512, sampling=sampling)


def test_warnings_on_texts(shared: Path) -> None:
    evaluation = of(shared, "wikitext2_test", 300, "first").ids.flatten()
    cases = [("wikitext2_valid", 128), ("code_sample", 128), ("tinystories_sample", 128), ("wikitext2_valid", 2)]
    found = [similarity(of(shared, *case).ids, evaluation, 4096) for case in cases]
    assert [(each.small, each.unlike) for each in found] == [
        (False, False),
        (False, True),
        (False, True),
        (True, False),
    ]
    assert found[0].warnings == ()
    assert "unlike the evaluation text" in found[1].warnings[0] and "0.06" in found[1].warnings[0]
    assert "raise --samples" in found[3].warnings[0]


def test_a_few_articles_of_the_same_kind_are_not_unlike_and_a_page_of_another_is(shared: Path) -> None:
    """The first tokens of a text are of few subjects: they differ from a sample of many by more than 0.06 bits."""
    checkpoint = open_checkpoint(shared / "models" / "wiki-8m")

    def begin(name: str) -> torch.Tensor:
        text = Text(name, (shared / "data" / f"{name}.txt").read_text()[:400_000])
        return encode([checkpoint], text, 65536, None)[0]

    learned, same, code, web = map(begin, ("wikitext2_valid", "wikitext2_test", "code_sample", "c4_sample"))
    for windows, length in ((8, 64), (16, 128), (64, 512)):
        places = torch.linspace(0, len(learned) - length, windows).long()
        sample = learned[places[:, None] + torch.arange(length)]
        assert max(similarity(sample, same[:tokens], 4096).excess or 0 for tokens in (1024, 4000, 8000)) > 0.06
        for tokens in (1024, 4000, 16000, 65536):
            found = [similarity(sample, text[:tokens], 4096).unlike for text in (same, code, web)]
            assert found == [False, True, True], (windows, length, tokens)


def test_without_a_text_to_evaluate_on_the_sample_alone_is_judged() -> None:
    dice = torch.Generator().manual_seed(0)
    few, many = (torch.randint(0, 50, (windows, 16), generator=dice) for windows in (2, 400))
    found = [similarity(sample, None, 50) for sample in (few, many)]
    assert [(each.small, each.unlike, each.tokens, each.excess) for each in found] == [
        (True, False, 0, None),
        (False, False, 0, None),
    ]
    assert found[1].warnings == () and "is small" in found[0].warnings[0]
    assert found[0].noise == similarity(few, torch.arange(50), 50).noise
