"""What opening makes of a checkpoint and keeps in a file: the same bits at the next start, and no trust in the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.cli import group
from lowbit.errors import CheckpointError
from lowbit.runtime.decoder import Session
from lowbit.runtime.linear import Linear
from lowbit.runtime.panels import pack
from lowbit.runtime.runner import Runner, open_runner
from lowbit.runtime.stored import Stored, _write, read_stored, write_stored
from lowbit.schemes import parse
from tests.reference.qtensors import random_qtensor
from tests.unit.test_decoder import IDS, saved


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With merged matrices, of which each part is kept by itself."""
    root = tmp_path_factory.mktemp("stored")
    saved(root / "float", "phi3", pad_token_id=0, sliding_window=16)
    lowbit.quantize(root / "float", root / "out", scheme="int4-g32-asym")
    return root / "out"


@pytest.fixture
def kept(model: Path, tmp_path: Path) -> Path:
    """A folder with what was made of it."""
    open_runner(model, cache=tmp_path / "kept")
    return tmp_path / "kept"


def logits(runner: Runner) -> torch.Tensor:
    assert isinstance(runner.reader, Session)
    return runner.reader.follow(IDS[0])


def test_the_second_start_gives_the_same_bits(model: Path, kept: Path) -> None:
    (file,) = kept.iterdir()
    before, one, again = file.stat(), open_runner(model), open_runner(model, cache=kept)
    after = file.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "it was opened as at first"
    assert torch.equal(logits(one), logits(again))
    assert (one.ends, one.limit, one.kernels, one.others) == (again.ends, again.limit, again.kernels, again.others)
    assert len(list(kept.iterdir())) == 1
    exact = open_runner(model, exact=True, cache=kept)
    assert not torch.equal(logits(exact), logits(one)) and len(list(kept.iterdir())) == 2


def test_loaded_models_keep_theirs_too(model: Path, tmp_path: Path) -> None:
    one, again = (lowbit.load(model, cache=tmp_path / "new" / "kept") for _ in range(2))
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, again(IDS).logits)
    layers = [each for each in again.modules() if isinstance(each, Linear)]
    assert len(layers) == 9
    (file,) = (tmp_path / "new" / "kept").iterdir()
    assert {name.split("/")[0] for name in load_file(file)} == {"m", "facts", "sum"}


@pytest.mark.parametrize("change", ["time", "size", "config", "place"])
def test_another_checkpoint_is_opened_anew(change: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    file, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    open_runner(tmp_path / "model", cache=tmp_path / "kept")
    where = tmp_path / "model"
    if change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "size":
        tensors = load_file(file)
        save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].double()}, file)
    elif change == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    else:
        where = where.rename(tmp_path / "other")
    open_runner(where, cache=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize("place", [0.05, 0.4, 0.9, 1.0])
def test_a_byte_that_changed_is_found(place: float, model: Path, kept: Path) -> None:
    """In the header, among codes, scales, and in the digest."""
    (file,) = kept.iterdir()
    data = bytearray(file.read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="no cache that was written here, delete it"):
        open_runner(model, cache=kept)


Facts = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def _facts(change: Callable[[Facts], object]) -> Callable[[Tensors], object]:
    """A change of the facts."""

    def made(tensors: Tensors) -> None:
        facts = json.loads(tensors["facts"].numpy().tobytes())
        change(facts)
        tensors["facts"] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)

    return made


def _halved(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][: len(tensors[name]) // 2].clone()})


LIES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no facts": (lambda t: t.pop("facts"), "facts"),
    "facts are no JSON": (lambda t: t.update(facts=torch.zeros(9, dtype=torch.uint8)), "not valid JSON"),
    "another key": (_facts(lambda f: f.update(key="0" * 40)), "belongs to another checkpoint"),
    "rows that are not there": (_facts(lambda f: f["matrices"]["0.up"].update(rows=1 << 40)), "codes has shape"),
    "bits that no panel has": (_facts(lambda f: f["matrices"]["0.up"].update(bits=3)), "make no panels"),
    "more inputs than columns": (_facts(lambda f: f["matrices"]["0.up"].update(inputs=1 << 20)), "inputs is"),
    "an unknown way": (_facts(lambda f: f["matrices"]["0.up"].update(way="guess")), "guess"),
    "an unknown fact": (_facts(lambda f: f["matrices"]["0.up"].update(more=1)), "more"),
    "heads without number": (_facts(lambda f: f["shape"].update(heads=-4)), "no decoder"),
    "wider heads": (_facts(lambda f: f["shape"].update(head_size=32)), "it must be"),
    "a window below 0": (_facts(lambda f: f["native"].update(windows=[-1, 0])), "windows"),
    "a table that is not there": (_facts(lambda f: f["native"].update(angles=[0, 7])), "angles"),
    "half of the codes": (_halved("m/0.up/codes"), "codes has shape"),
    "half of an embedding": (_halved("v/embedding"), "embedding is"),
    "a norm in float64": (lambda t: t.update({"v/0.before": t["v/0.before"].double()}), "before is torch.float64"),
    "half of the angles": (_halved("v/angles.0"), "angles has shape"),
    "a matrix less": (_facts(lambda f: f["matrices"].pop("1.down")), "1.down"),
    "scales as integers": (lambda t: t.update({"m/0.up/scale": t["m/0.up/scale"].to(torch.int32)}), "scale is"),
}


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    """The file with a change, and the digest of what it has then."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name != "sum"}
    change(tensors)
    with path.open("w+b") as file:
        _write(file, tensors)


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie_are_refused(lie: str, model: Path, kept: Path) -> None:
    change, says = LIES[lie]
    (file,) = kept.iterdir()
    rewrite(file, change)
    with pytest.raises(CheckpointError, match="no cache that was written here, delete it") as error:
        logits(open_runner(model, cache=kept))
    assert says in str(error.value)


@pytest.fixture
def nested(tmp_path: Path) -> tuple[Path, Stored]:
    """A file of weights with nested scales: integers of scales alone, joined with those of minima, and beside them."""
    schemes = {"alone": "q3_k", "joined": "q2_k", "beside": "q4_k", "table": "iq4_xs"}
    matrices = {name: pack(random_qtensor(parse(scheme), (40, 512))) for name, scheme in schemes.items()}
    stored = Stored({}, matrices, {})
    write_stored(tmp_path / "nested.safetensors", stored)
    return tmp_path / "nested.safetensors", stored


def test_nested_scales_are_kept(nested: tuple[Path, Stored]) -> None:
    file, stored = nested
    found, x = read_stored(file), torch.randn(3, 512)
    for name, packed in stored.matrices.items():
        again = found.matrices[name]
        assert again.panels.over == 256 and (again.panels.fine_zero is None) == (name != "beside")
        assert torch.equal(again.matrix()(x), packed.matrix()(x))


NESTED_LIES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no integers of scales": (lambda t: t.pop("m/alone/fine"), "need integers"),
    "no integers of minima": (lambda t: t.pop("m/beside/fine_zero"), "need integers"),
    "half of the integers": (_halved("m/beside/fine"), "fine"),
    "half of those of minima": (_halved("m/beside/fine_zero"), "fine_zero"),
    "integers without sign": (lambda t: t.update({"m/alone/fine": t["m/alone/fine"].byte()}), "fine"),
    "no runs": (_facts(lambda f: f["matrices"]["alone"].update(over=0)), "no run"),
    "shorter runs": (_facts(lambda f: f["matrices"]["alone"].update(over=64)), "scale has shape"),
    "runs that are too long": (_facts(lambda f: f["matrices"]["alone"].update(over=1 << 40)), "make no panels"),
    "runs below 0": (_facts(lambda f: f["matrices"]["alone"].update(over=-256)), "make no panels"),
    "half a run": (_facts(lambda f: f["matrices"]["alone"].update(over=256.5)), "256.5"),
    "joined, and not": (_facts(lambda f: f["matrices"]["beside"].update(joined=True)), "need integers"),
    "joined in words": (_facts(lambda f: f["matrices"]["joined"].update(joined="yes")), ""),
    "an offset that overflows": (_facts(lambda f: f["matrices"]["alone"].update(offset=1e30)), "offset"),
    "floats of nested scales": (_facts(lambda f: f["matrices"]["table"].update(way="floats")), "need integers"),
    "half of the scales": (_halved("m/joined/scale"), "scale has shape"),
    "half of the codes": (_halved("m/alone/codes"), "codes has shape"),
}


@pytest.mark.parametrize("lie", NESTED_LIES)
def test_nested_scales_that_lie_are_refused(lie: str, nested: tuple[Path, Stored]) -> None:
    change, says = NESTED_LIES[lie]
    rewrite(nested[0], change)
    with pytest.raises(CheckpointError, match="no cache that was written here, delete it") as error:
        read_stored(nested[0])
    assert says in str(error.value)


@pytest.mark.parametrize("end", [0, 7, 100, -1])
def test_files_that_are_cut_off_are_refused(end: int, model: Path, kept: Path) -> None:
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(CheckpointError, match="delete it"):
        open_runner(model, cache=kept)


def test_a_folder_that_cannot_be_written_to_is_said_and_done_without(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "kept"
    said = r"nothing is kept for the next start: .* cannot be written: Not a directory"
    with pytest.warns(UserWarning, match=said):
        assert open_runner(model, cache=folder).engine
    with pytest.warns(UserWarning, match=said):
        lowbit.load(model, cache=folder)
    notes: list[str] = []
    open_runner(model, cache=folder, note=notes.append)
    assert len(notes) == 1


def test_the_command_keeps_it_where_it_is_told(wiki_8m: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(wiki_8m), "--prompt", "The city", "--max-tokens", "3", "--cache", str(tmp_path)]
    texts = [CliRunner().invoke(group, arguments).stdout for _ in range(2)]
    assert len(list(tmp_path.iterdir())) == 1 and texts[0] == texts[1] != ""
