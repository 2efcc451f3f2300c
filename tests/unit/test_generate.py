"""Text from a model: where it begins and ends, what it is refused over, and whose fault that is said to be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import lowbit
from lowbit.cli import group
from lowbit.errors import CheckpointError, UsageError
from lowbit.runtime.generate import Sampling, _Text, answer, generate
from lowbit.runtime.runner import open_runner
from tests.reference.models import save_tiny, save_words
from tests.unit.test_decoder import saved

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, wiki_8m: Path) -> Path:
    """A model with a chat template."""
    path = Path(shutil.copytree(wiki_8m, tmp_path_factory.mktemp("chat") / "model"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def spaced(tmp_path: Path) -> Path:
    """A model whose tokens are words with the space before them, or bytes, as SentencePiece has them."""
    words = [f"\u2581w{number}" for number in range(79)]
    pieces = [f"<0x{byte:02X}>" for byte in "é😀".encode()]
    vocabulary = {token: at for at, token in enumerate(["<unk>", "<s>", "</s>", *pieces, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    saved(tmp_path / "model", "llama")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def change(path: Path, told: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | told))


def chat(model: Path, lines: str | bytes, *options: str) -> tuple[int, str, str]:
    arguments = ["chat", str(model), "--temperature", "0", "--max-tokens", "4", *options]
    found = CliRunner().invoke(group, arguments, input=lines, standalone_mode=False)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


def test_the_space_before_a_continuation_is_there(spaced: Path) -> None:
    """Of no answer, a text of its own, is it there; a character in bytes comes when it is whole."""
    runner, shown = open_runner(spaced), list[str]()
    words = list(range(3, 11))  # two bytes, four bytes, and two words

    def written(before: list[int], new: list[int], answers: bool) -> str:
        text = _Text(runner, torch.tensor(before), Sampling(), shown.append, answers=answers)
        assert all(text.take(token) for token in new)
        return text.result().text

    for before in ([words[6]], [words[6], *words[:2]], [words[6], *(5 * words[2:6])]):
        for new, text in (([words[7]], " w1"), ([*words[2:6], words[7]], "😀 w1"), ([*words[:2], *words[2:6]], "é😀")):
            shown.clear()
            assert written(before, new, answers=False) == text == "".join(shown)
            assert written(before, new, answers=True) == text.lstrip()
    assert "\ufffd" not in "".join(shown)


@pytest.mark.parametrize("count", [1, 2])
def test_a_text_ends_right_after_what_stops_it(count: int, wiki_8m: Path) -> None:
    """In the middle of a token too, and after the first of several."""
    runner, shown = open_runner(wiki_8m), list[str]()
    whole = generate(runner, "The history of the city", Sampling(tokens=20)).text
    word = max(whole[:-1].split(), key=len)
    stops = (word[1 : len(word) // 2], whole[-9:])[:count]
    found = generate(runner, "The history of the city", Sampling(tokens=20, stop=stops), shown.append)
    assert found.text == whole[: whole.index(stops[0]) + len(stops[0])] == "".join(shown)


@pytest.mark.parametrize("more", [{}, {"add_bos_token": False}])
def test_the_text_of_a_special_token_ends_at_that_token(more: dict[str, Any], spaced: Path) -> None:
    """Which is left out of the text. With a key that is not known, the tokenizer is that of transformers."""
    prompt = "w1 w2 w3"
    whole = generate(open_runner(spaced), prompt, Sampling(tokens=12))
    words = whole.text.split()
    last = next(word for at, word in enumerate(words) if at > 3 and word[1:].isdigit() and word not in words[:at])
    tokenizer = Tokenizer.from_file(str(spaced / "tokenizer.json"))
    tokenizer.add_special_tokens([f"\u2581{last}"])
    tokenizer.save(str(spaced / "tokenizer.json"))
    change(spaced / "tokenizer_config.json", more)
    runner = open_runner(spaced)
    assert generate(runner, prompt, Sampling(tokens=12)).tokens == whole.tokens
    found = generate(runner, prompt, Sampling(tokens=12, stop=("nothing", f"\u2581{last}")))
    assert (found.ended, found.text) == ("stop", whole.text[: whole.text.index(f" {last}")])
    change(spaced / "tokenizer_config.json", {"eos_token": f"\u2581{last}"})  # the configuration names another
    ended = generate(open_runner(spaced), prompt, Sampling(tokens=12))
    assert (ended.ended, ended.text) == ("end", found.text)


@pytest.mark.parametrize("form", ["gguf", "float"])
def test_a_file_ends_texts_as_its_directory_does(form: str, wiki_8m: Path, tmp_path: Path) -> None:
    shutil.copytree(wiki_8m, tmp_path / "out") if form == "float" else lowbit.quantize(
        wiki_8m, tmp_path / "out", format=form
    )
    change(tmp_path / "out" / "generation_config.json", {"eos_token_id": [1, 10, 11]})
    (file,) = (path for path in (tmp_path / "out").iterdir() if path.stem == "model")
    assert open_runner(file).ends == open_runner(tmp_path / "out").ends == {1, 10, 11}


@pytest.mark.parametrize("kind", ["mamba", "openai-gpt", "gpt2"])
def test_texts_of_classes_that_keep_other_things_or_nothing(kind: str, tmp_path: Path) -> None:
    """States, nothing, keys and values: the tokens are those of transformers' own loop."""
    model, _ = save_tiny(kind, tmp_path), save_words(tmp_path)
    runner = replace(open_runner(tmp_path, exact=True), ends=frozenset())
    ids = torch.tensor([runner.words.encode("w5 w9 w60 w12 w33")])
    with torch.no_grad():
        want = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=[])[0, 5:]
    for _ in range(2):  # the second begins anew
        found = generate(runner, "w5 w9 w60 w12 w33", Sampling(tokens=20))
        assert found.text.split() == runner.words.decode(want.tolist()).split() and found.tokens == 20
    assert (runner.reader.nbytes > 0) is (kind != "openai-gpt")


def test_why_a_text_ends_is_told(wiki_8m: Path, chatty: Path) -> None:
    prompt, runner = "The history of the city", open_runner(wiki_8m, context=24)
    whole = generate(runner, prompt, Sampling(tokens=99))
    assert (whole.ended, whole.prompt_tokens + whole.tokens) == ("context", 24)
    assert generate(runner, prompt, Sampling(tokens=whole.tokens)).ended == "tokens"
    stopped = generate(runner, prompt, Sampling(tokens=99, stop=(whole.text[:9],)))
    assert stopped.ended == "stop"
    assert generate(runner, prompt, Sampling(tokens=stopped.tokens, stop=(whole.text[:9],))).ended == "stop"
    ids = runner.tokenizer(whole.text, add_special_tokens=False)["input_ids"]
    assert generate(replace(runner, ends=frozenset(ids)), prompt, Sampling(tokens=99)).ended == "end"
    for given, full in ((["--context", "24"], True), (["-n", "3"], False)):
        found = CliRunner().invoke(group, ["generate", str(wiki_8m), prompt, *given])
        assert ("the context of 24 tokens is full" in found.stderr) is ("is full" in found.stderr) is full
    told = chat(chatty, "The city\n", "--context", "24", "--max-tokens", "99")[2]
    assert "the context of 24 tokens is full: the answer ends here" in told


@pytest.mark.parametrize("temperature", [1e-34, 1e-36, 1e-45])
def test_the_coldest_texts_are_the_likeliest(temperature: float, wiki_8m: Path) -> None:
    runner = open_runner(wiki_8m)
    for penalty in (1.0, 1.2):
        found, wanted = (
            generate(runner, "The city", Sampling(tokens=9, temperature=each, repetition_penalty=penalty)).text
            for each in (temperature, 0.0)
        )
        assert found == wanted


def test_what_shows_a_text_fails_by_itself(wiki_8m: Path) -> None:
    def show(part: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        generate(open_runner(wiki_8m), "The city", Sampling(tokens=3), show)


def test_what_is_no_text_or_too_long_is_refused(chatty: Path) -> None:
    runner = open_runner(chatty, context=16)
    with pytest.raises(UsageError, match=r"^the prompt is no UTF-8: what stands at character 3 is none$"):
        generate(runner, "ab\udcff", Sampling())
    with pytest.raises(UsageError, match=r"^the message is no UTF-8"):
        answer(runner, [{"role": "user", "content": "\udcff"}], Sampling())
    with pytest.raises(UsageError, match="tokens leave no room to go on in a context of 16; give a larger --context"):
        generate(runner, "The city " * 9, Sampling())
    runner = open_runner(chatty)
    with pytest.raises(UsageError, match=f"in a context of {runner.positions}; this model takes no more"):
        generate(runner, "The city " * runner.positions, Sampling())
    with pytest.raises(UsageError, match="the prompt is empty"):
        _Text(runner, torch.tensor([], dtype=torch.int64), Sampling(), print)


@pytest.mark.parametrize("told", ["x", [1, "x"], {"a": 1}, 2.5])
def test_an_end_that_is_no_token_is_refused(told: object, wiki_8m: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(wiki_8m, tmp_path / "model"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": told}))
    with pytest.raises(CheckpointError, match=r"generation_config.json has .* as eos_token_id, where the number"):
        open_runner(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "nan"], "no finite number"),
        (["--temperature", "inf"], "no finite number"),
        (["--top-p", "nan"], "no finite number"),
        (["--repetition-penalty", "inf"], "no finite number"),
        (["--stop", ""], "an empty string is everywhere"),
        (["--seed", "99999999999999999999", "--temperature", "1"], "is not in the range 0 to 2^64 - 1"),
        (["--context", "1"], "not in the range x>=2"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], said: str, wiki_8m: Path) -> None:
    found = CliRunner().invoke(group, ["generate", str(wiki_8m), "The city", "--max-tokens", "2", *options])
    assert found.exit_code == 2 and said in found.stderr


def test_a_file_of_prompts_is_text(wiki_8m: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(UsageError, match=r"bad.txt is no UTF-8"):
        CliRunner().invoke(
            group, ["generate", str(wiki_8m), "--prompts", str(tmp_path / "bad.txt")], catch_exceptions=False
        )


def test_prompts_are_lines_of_a_file_and_nothing_less(spaced: Path, tmp_path: Path) -> None:
    """A form feed or Unicode's own line separator parts nothing; a mark of UTF-8 is no text; an empty line is named."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfw1 w2\r\nw3\x0cw4\n" + "w5\u2028w6\x85\n".encode())
    line = ["generate", str(spaced), "--prompts", str(file), "-n", "1", "--json"]
    found = json.loads(CliRunner().invoke(group, line, catch_exceptions=False).stdout)
    assert [each["prompt_tokens"] for each in found] == [2, 1, 1]
    file.write_bytes(b"w1 w2\n\nw3")
    with pytest.raises(UsageError, match=r"^prompt 2 of 3: the prompt is empty"):
        CliRunner().invoke(group, line, catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content.no.no }}", "has no attribute 'no'"),
        ("{% for x %}", "expected token 'in'"),
        ("{{ 'a' * 99999999999999999 }}", ""),
    ],
)
def test_a_template_that_refuses_is_one_sentence(template: str, said: str, chatty: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(chatty, tmp_path / "model"))
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match=f"^the chat template of this model refuses the conversation: .*{said}"):
        chat(path, "The city\n", "--system", "Be brief.")


def test_a_conversation_is_refused_before_anything_is_asked(wiki_8m: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        chat(wiki_8m, "")


def test_a_conversation_that_fills_the_context_goes_on_without_its_oldest_turns(chatty: Path) -> None:
    lines = [f"The city number {number} is" for number in range(6)]
    code, out, err = chat(chatty, "\n".join(lines), "--context", "64", "--system", "Be brief.")
    runner, told = open_runner(chatty, context=64), [{"role": "system", "content": "Be brief."}]
    assert code == 0 and "the context of 64 tokens is full: the oldest 2 messages are left out from here on" in err
    answers = []
    for line in lines:
        told.append({"role": "user", "content": line})
        template: Any = runner.tokenizer.apply_chat_template
        while len(template(told, add_generation_prompt=True)["input_ids"]) > 60:  # four more are to come
            del told[1:3]
        answers.append(answer(runner, told, Sampling(tokens=4)).text)
        told.append({"role": "assistant", "content": answers[-1]})
    assert out == "".join(f"{text}\n" for text in answers) and 3 < len(told) < 12


def test_a_message_that_cannot_be_answered_leaves_the_others(chatty: Path) -> None:
    code, out, err = chat(chatty, b"The city\n" + b"The city " * 90 + b"\n\xff\nThe river\n", "--context", "64")
    assert code == 1 and "leave no room to go on in a context of 64" in err and "the message is no UTF-8" in err
    assert out == chat(chatty, "The city\nThe river\n", "--context", "64")[1]


def test_an_answer_imports_nothing(chatty: Path) -> None:
    """Ctrl-C ends one, and a module that it hits while it is imported stays half of one."""
    code = (
        "import sys\n"
        "from lowbit.runtime.generate import Sampling, answer, prepare\n"
        "from lowbit.runtime.runner import open_runner\n"
        "runner, sampling = open_runner(sys.argv[1]), Sampling(tokens=9, temperature=1.0, top_k=5, top_p=0.9)\n"
        "prepare(runner, [], sampling)\n"
        "before = set(sys.modules)\n"
        "answer(runner, [{'role': 'user', 'content': 'The city'}], sampling)\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(chatty)], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
