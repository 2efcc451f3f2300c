"""`lowbit --help` answers at once, because nothing heavy is imported before it is needed; lines of progress."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowbit.cli._options import _Lines

HEAVY = {"torch", "transformers", "numpy", "altair", "safetensors", "tokenizers", "rich"}
MAIN = "from lowbit.cli import main; main()"
LOADED = "import json, sys; print('\\n' + json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_takes_less_than_300_ms() -> None:
    console_script = Path(sys.executable).with_name("lowbit")
    command = [str(console_script)] if console_script.exists() else [sys.executable, "-c", MAIN]
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([*command, "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    # The third fastest: the median of an idle machine, without what other tests on the same cores do to the rest.
    print(f"lowbit --help: {sorted(seconds)[2]:.3f} s")
    assert sorted(seconds)[2] < 0.3, seconds


@pytest.mark.parametrize(
    "code",
    ["import lowbit", f"import sys\ntry:\n    {MAIN}\nexcept SystemExit:\n    pass", "import lowbit.cli"],
    ids=["import lowbit", "lowbit --help", "import lowbit.cli"],
)
def test_start_imports_nothing_heavy(code: str) -> None:
    loaded = json.loads(python(f"{code}\n{LOADED}", "--help").splitlines()[-1])
    assert "lowbit" in loaded
    assert not HEAVY & set(loaded)


def test_a_llama_goes_into_gguf_without_transformers(wiki_8m: Path, tmp_path: Path) -> None:
    """Its import takes longer than the rest; `gc` says that what was imported is not looked through again."""
    command = ["quantize", str(wiki_8m), str(tmp_path / "out"), "--scheme", "q8_0", "--format", "gguf"]
    told = "import gc; print('\\n' + str(gc.get_freeze_count()))"
    text = python(f"{MAIN}\n{told}\n{LOADED}", *command)
    *_, frozen, _, loaded = text.splitlines()
    assert "tokenizers" in json.loads(loaded) and "transformers" not in json.loads(loaded)
    assert int(frozen) > 10_000


@pytest.mark.parametrize(("options", "wanted"), [([], "False False"), (["--temperature", "1"], "True False")])
def test_a_llama_goes_on_without_transformers_or_its_class(options: list[str], wanted: str, wiki_8m: Path) -> None:
    """Importing either takes longer than all else; chances are weighed by transformers."""
    command = ["generate", str(wiki_8m), "--prompt", "The", "--max-tokens", "2", *options]
    named = "['transformers', 'transformers.modeling_utils']"
    loaded = f"import sys; print('\\n', *[name in sys.modules for name in {named}])"
    text = python(f"{MAIN}\n{loaded}", *command)
    assert text.splitlines()[-1].split() == wanted.split()


def test_help_names_every_command() -> None:
    text = python(MAIN, "--help")
    files = (Path(__file__).resolve().parents[2] / "src" / "lowbit" / "cli").glob("[!_]*.py")
    assert all(f"\n  {file.stem} " in text for file in files), text


def test_the_help_of_quantize_names_every_scheme_method_and_format() -> None:
    from lowbit import plugins
    from lowbit.schemes import FAMILIES

    text = " ".join(python(MAIN, "quantize", "--help").split())
    grids = [name for name in FAMILIES if not re.fullmatch(r"int[2-7]", name)]
    folders = ("methods", "transforms", "corrections", "formats")
    unmade = plugins.READ_ONLY | plugins.CONVERTED
    listed = [name for folder in folders for name in plugins.names(folder) if name not in unmade]
    plugged = [name.replace("_", "-") for name in listed]
    assert not [name for name in [*grids, *plugged, "rotate", "tune"] if not re.search(rf"\b{name}\b", text)]


def test_time_left_is_that_of_the_stage_and_of_what_this_run_did(capsys: pytest.CaptureFixture[str]) -> None:
    """Two models with the same stage one after the other; the second goes on where an earlier run was."""
    steps = [(0, 0), (10, 2), (20, 4), (100, 2), (110, 3), (120, 4)]
    clock = iter([seconds for seconds, _ in steps])
    lines = _Lines(lambda: next(clock))
    for _, done in steps:
        lines.show("calibrate", done, 4)
    assert capsys.readouterr().err.splitlines() == [
        "calibrate: 50%, 10.0 s, 10 s left",
        "calibrate: 100%, 20.0 s",
        "calibrate: 50%, 0.0 s",
        "calibrate: 75%, 10.0 s, 10 s left",
        "calibrate: 100%, 20.0 s",
    ]
