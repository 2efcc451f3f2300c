"""Writing: shards that appear whole, a journal that is believed only where the bytes agree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit import native
from lowbit.errors import JournalError, LowbitError, ResourceError, WeightError
from lowbit.pipeline import Request, run
from lowbit.stages import _store, write
from lowbit.stages.plan import Rules

RULES = Rules("int4-g32")


def write_model(path: Path, layers: int = 3, cols: int = 64, seed: int = 0) -> Path:
    """A few matrices, a norm, a config and a sidecar file."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir(parents=True)
    tensors = {f"layers.{i}.proj.weight": torch.randn(48, cols, generator=generator) for i in range(layers)}
    tensors |= {"norm.weight": torch.ones(cols), "odd.bias": torch.ones(3)}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "made-up"}')
    (path / "LICENSE").write_text("free")
    return path


def request(model: Path, out: Path, rules: Rules = RULES, shard_bytes: int = 4000) -> Request:
    return Request(str(model), out, rules, shard_bytes=shard_bytes)


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file() and ".lowbit" not in file.parts)
    return {file.name: file.read_bytes() for file in files if not file.name.startswith("report.")}


def journal(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / ".lowbit/journal.jsonl").read_text().splitlines()]


def test_shards_are_safetensors_and_the_index_is_true(tmp_path: Path) -> None:
    run(request(write_model(tmp_path / "m"), tmp_path / "out"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    total = 0
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(shard)
        found |= dict.fromkeys(tensors, shard.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(found.values())) > 1
    assert [line["verified"] for line in journal(tmp_path / "out")[1:]] == [True] * 5
    assert index == {"metadata": {"total_size": total}, "weight_map": found}


def test_kept_tensors_and_sidecar_files_are_carried_unchanged(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    run(request(model, tmp_path / "out", shard_bytes=10**9))
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("norm.weight"), load_file(model / "model.safetensors")["norm.weight"])
    assert (tmp_path / "out/LICENSE").read_text() == "free"


def test_a_finished_run_given_again_changes_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    run(request(model, tmp_path / "out"))
    shards = list((tmp_path / "out").glob("*.safetensors"))
    before, stamps = contents(tmp_path / "out"), [shard.stat().st_mtime_ns for shard in shards]
    result = run(request(model, tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert [shard.stat().st_mtime_ns for shard in shards] == stamps
    assert result.resumed == 5


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_a_torn_journal_line_costs_one_tensor(tmp_path: Path, cut: int) -> None:
    model = write_model(tmp_path / "m")
    run(request(model, tmp_path / "whole"))
    run(request(model, tmp_path / "out"))
    file = tmp_path / "out/.lowbit/journal.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    run(request(model, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(journal(tmp_path / "out")) == 6


def test_bytes_that_do_not_match_the_journal_are_made_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    run(request(model, tmp_path / "whole"))
    run(request(model, tmp_path / "out"))
    shard = min((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    run(request(model, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (Rules("int8-g32"), r"scheme of layers\.0\.proj\.weight is int4-g32-bf16 there, int8-g32-bf16 here"),
        (Rules("int4-g32", method="mse"), r"method of layers\.0\.proj\.weight is rtn there, mse here"),
        (Rules("int4-g32", format="gptq_v2", skip=("48",)), "matches no tensor"),
        (Rules("int4-g32", skip=(r"layers\.1",)), r"scheme of layers\.1"),
    ],
)
def test_another_plan_over_an_old_journal_is_refused(tmp_path: Path, rules: Rules, words: str) -> None:
    model = write_model(tmp_path / "m")
    run(request(model, tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(LowbitError, match=words):
        run(request(model, tmp_path / "out", rules))
    assert contents(tmp_path / "out") == before


def test_another_input_over_an_old_journal_is_refused(tmp_path: Path) -> None:
    run(request(write_model(tmp_path / "a"), tmp_path / "out"))
    with pytest.raises(JournalError, match=r"layers\.0\.proj\.weight has changed"):
        run(request(write_model(tmp_path / "b", seed=1), tmp_path / "out"))
    with pytest.raises(JournalError, match="other tensors in the input"):
        run(request(write_model(tmp_path / "c", layers=4), tmp_path / "out"))


def test_a_directory_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(JournalError, match="holds something else"):
        run(request(write_model(tmp_path / "m"), tmp_path / "out"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(JournalError, match="is a file"):
        run(request(write_model(tmp_path / "m"), tmp_path / "out"))


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    run(request(model, tmp_path / "out"))
    import fcntl

    with (tmp_path / "out/.lowbit/journal.jsonl").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(JournalError, match="another run"):
            run(request(model, tmp_path / "out"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["int4-g32", "fp8-e4m3-tensor", "nvfp4"])
def test_a_weight_that_is_not_a_number_is_named_with_its_place(tmp_path: Path, value: float, scheme: str) -> None:
    model = write_model(tmp_path / "m", layers=1)
    tensors = load_file(model / "model.safetensors")
    tensors["layers.0.proj.weight"][5, 7] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(WeightError, match=r"layers\.0\.proj\.weight.*row 5, column 7"):
        run(request(model, tmp_path / "out", Rules(scheme)))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_pages_are_given_back_once_they_were_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows far smaller than a tensor change no byte; no page is let go unread, nearly all are twice or more."""
    model = write_model(tmp_path / "m", cols=1024)
    run(request(model, tmp_path / "whole", shard_bytes=10**6))
    read: set[int] = set()
    advised: Counter[tuple[int, int]] = Counter()

    def holds(file: int, parts: Sequence[tuple[torch.Tensor, int]]) -> bool:
        read.update(*(range(start, start + part.nbytes) for part, start in parts))
        return file_holds(file, parts)

    def advise(file: int, start: int, size: int, advice: int) -> None:
        assert read.issuperset(range(start, start + size))
        advised[start, size] += 1

    file_holds = native.file_holds
    monkeypatch.setattr(write, "_WINDOW", 1000)
    monkeypatch.setattr(_store, "_RUN", 500)
    monkeypatch.setattr(native, "file_holds", holds)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    run(request(model, tmp_path / "out", shard_bytes=10**6))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    stored = (tmp_path / "whole/model.safetensors").stat().st_size
    twice = sum(size for (_, size), times in advised.items() if times >= 2)
    assert stored - 6000 < twice < stored


def test_too_little_disk_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ResourceError, match="more disk space"):
        run(request(write_model(tmp_path / "m"), tmp_path / "out"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_stops_with_a_sentence_and_the_run_goes_on_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file system of 2 MB that somebody else fills after the check at the start; then room is made."""
    model, small = write_model(tmp_path / "m", layers=40, cols=2048), tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("this machine does not let tests mount a file system")
    try:
        monkeypatch.setattr(write, "_check_disk", lambda path, shards: (small / "other").write_bytes(bytes(10**6)))
        with pytest.raises(ResourceError, match=r"disk of .* is full; what is finished is kept"):
            run(request(model, small / "out", shard_bytes=200_000))
        assert list((small / "out").glob("*.safetensors"))
        (small / "other").unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        monkeypatch.undo()
        done = run(request(model, small / "out", shard_bytes=200_000))
        assert done.resumed > 0
        run(request(model, tmp_path / "whole", shard_bytes=200_000))
        assert contents(small / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
