"""Standard input and output that are closed, full, or in other letters; and places that cannot be written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowbit import cli
from tests.e2e.command import CommandLine

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
FULL = "lowbit: standard output: No space left on device"


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """A process of its own: what ends it may come when Python does."""
    command = [sys.executable, "-m", "lowbit", *map(str, arguments)]
    return subprocess.run(command, check=False, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    ("arguments", "buffered"),
    [(["--help"], True), (["--help"], False), (["generate", "MODEL", "The"], True), (["inspect", "MODEL"], False)],
)
def test_a_full_disk_is_one_sentence(arguments: list[str], buffered: bool, wiki_8m: Path) -> None:
    given = [str(wiki_8m) if each == "MODEL" else each for each in arguments]
    with open("/dev/full", "wb") as full:
        found = process(*given, stdout=full, env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"})
    said = found.stderr.decode().splitlines()
    assert found.returncode == 1 and [line for line in said if not line.startswith("inspect: ")] == [FULL]


def test_a_pipe_that_is_closed_ends_it_without_a_word(wiki_8m: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "wb") as closed:
        found = process("generate", wiki_8m, "The", stdout=closed)
    assert (found.returncode, found.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("given", "said"),
    [(None, "Error: standard input is closed"), (b"\xff\xfeabc", "lowbit: the prompt is no UTF-8: what stands at")],
)
def test_what_standard_input_gives_is_judged(given: bytes | None, said: str, wiki_8m: Path) -> None:
    closed: dict[str, Any] = {"input": given} if given else {"preexec_fn": lambda: os.close(0)}
    found = process("generate", wiki_8m, "-p", "-", "-n", "2", **closed)
    assert found.returncode == 2 and found.stderr.decode().splitlines()[-1].startswith(said)


def test_an_argument_that_is_no_text_is_refused(lowbit: CommandLine, wiki_8m: Path) -> None:
    code, _, said = lowbit("generate", wiki_8m, os.fsdecode(b"ab\xff"))
    assert (code, said) == (2, "lowbit: the prompt is no UTF-8: what stands at character 3 is none\n")


def test_letters_that_the_terminal_has_not_are_printed_as_others(wiki_8m: Path) -> None:
    command = ["generate", str(wiki_8m), "\U0001f600", "-p", "The", "-n", "2"]
    found = process(*command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert found.returncode == 0 and found.stdout.startswith(b"\n??")


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "MODEL", "/proc/none/out", "--scheme", "int8-row"],
        ["convert", "MODEL", "/proc/none", "--format", "float"],
        ["plan", "MODEL", "--scheme", "int8-row", "--out", "/proc/none/plan.json"],
        ["sweep", "MODEL", "/proc/none", "--schemes", "int8-row", "--evaluate", "TEXT"],
        ["imatrix", "MODEL", "/proc/none/i.gguf", "--calibration", "TEXT", "--samples", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_places_that_cannot_be_written_to_are_named(arguments: list[str], lowbit: CommandLine, wiki_8m: Path) -> None:
    places = {"MODEL": wiki_8m, "TEXT": wiki_8m.parent / "evaluation.txt"}
    code, _, text = lowbit(*(places.get(each, each) for each in arguments))
    *before, said = text.splitlines()
    assert code == 1 and said.startswith("lowbit: /proc/none") and said.endswith(": No such file or directory")
    assert not before or arguments[0] in ("quantize", "convert")  # what the others make is not begun


def test_libraries_that_are_not_used_say_nothing(tmp_path: Path, wiki_8m: Path) -> None:
    """transformers imports torchao where it is installed, which warns of itself."""
    text, options = wiki_8m.parent / "evaluation.txt", ["--samples", "1", "--blocks", "0:1", "--method", "gptq"]
    found = process(
        "quantize", wiki_8m, tmp_path / "out", "--scheme", "int8-row", "--calibration", text, *options,
    )  # fmt: skip
    assert found.returncode == 0 and b"calibrate: 100%" in found.stderr
    assert b"torchao" not in found.stderr and b"opaque" not in found.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [("quantize", "; what is finished is kept: the same command goes on"), ("generate", ""), ("chat", "")],
)
def test_only_what_is_kept_is_said_to_be(
    command: str, said: str, lowbit: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(context: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.group, "invoke", stop)
    code, _, text = lowbit(command)
    assert code == 130 and text.strip() == f"lowbit: stopped{said}"
