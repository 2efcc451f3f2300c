"""Fuzzes the readers of checkpoints: `python benchmarks/fuzz_header.py --seconds 600`.

Whatever bytes a file holds, `open_checkpoint` either succeeds, and then every tensor can be read, has the dtype and
shape it was listed with and (safetensors) is what the safetensors library reads; or it raises a `LowbitError` of one
line that names the file. Nothing else is raised, nothing takes a second or more than 256 MiB.

Guided by coverage where the package `atheris` is installed, by random mutations where it is not.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KINDS = ("raw safetensors", "header", "directory", "pytorch")
SPLIT = b"\xff\xfe"
MEMORY = 256 * 2**20
SECONDS = 1.0

# What the library reads and this reader refuses on purpose: unreadable names, dtypes that torch or no scheme has, keys
# that mean nothing or stand twice (in the metadata), a file without tensors, sizes that torch cannot hold.
STRICTER = (
    "control characters", "is none of BOOL", "its entry is", "occurs twice", "no tensors", "larger than any",
    "not a list of whole",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 4, 7, 8, 24, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 1.0, 1e308, True, None, "", "a",
    "F32", "F16", "U8", "BOOL", "F8_E4M3", "F4", [], [0, 4], [2, 3], {}, "\n", "\ud800", "../a.safetensors",
    "b.safetensors",
    "__metadata__", "shape", "dtype", "data_offsets", "weight_map", "quantization_config", "gptq", "hqq", "m.qweight",
)  # fmt: skip


def lay_out(data: bytes, root: Path) -> Path:
    """The checkpoint that an input stands for: its first byte says which kind, the rest are its files."""
    kind, body = KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:]
    single = root / ("model.bin" if kind == "pytorch" else "model.safetensors")
    if kind == "header":
        single.write_bytes(_framed(body))
    elif kind == "directory":
        names = ("config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors")
        for name, part in zip(names, body.split(SPLIT), strict=False):
            if part:
                (root / name).write_bytes(_framed(part) if name.endswith(".safetensors") else part)
        return root
    else:
        single.write_bytes(body)
    return single


def _framed(body: bytes) -> bytes:
    """A safetensors file: one byte says how many bytes of data follow, the rest is the header."""
    header = body[1:]
    return len(header).to_bytes(8, "little") + header + bytes(body[0] if body else 0)


def check(data: bytes, root: Path, seconds: float = SECONDS) -> str:
    """Hold the reader to its promise on one input, `seconds` of processor time included; returns `read` or `refused`.

    Raises:
        AssertionError: the promise is broken; so does any error that is not a `LowbitError`.
    """
    from lowbit.errors import LowbitError
    from lowbit.stages.checkpoint import open_checkpoint

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    path, start, refusal = lay_out(data, root), time.process_time(), ""
    try:
        with open_checkpoint(path) as checkpoint:
            for name, spec in checkpoint.specs.items():
                tensor = checkpoint.tensor(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
            for name in checkpoint.weights:
                checkpoint.load(name)
    except LowbitError as error:
        refusal = str(error)
        assert refusal.isprintable() and str(root) in refusal and len(refusal) < 1000, refusal
    taken = time.process_time() - start
    assert taken < seconds, f"took {taken} s"
    if path.suffix == ".safetensors" and b"-0" not in data:  # the one number that is whole for Python and not for Rust
        _compare(path, refusal)
    return "refused" if refusal else "read"


def _compare(path: Path, refusal: str) -> None:
    """The safetensors library must read what we read, and the same; it may read what we refuse on purpose."""
    from safetensors import SafetensorError, deserialize

    from lowbit.stages.checkpoint import open_checkpoint

    try:
        theirs = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        theirs, reason = {}, str(error)
    if not theirs:
        assert refusal, f"the library refuses what we read: {reason}"
        return
    if refusal:
        assert any(reason in refusal for reason in STRICTER), f"the library reads what we refuse: {refusal}"
        return
    ours = open_checkpoint(path)
    assert ours.specs.keys() == theirs.keys()
    for name, spec in ours.specs.items():
        assert list(spec.shape) == theirs[name]["shape"]
        assert spec.dtype.itemsize * ours.tensor(name).numel() == len(theirs[name]["data"])


def seeds() -> list[bytes]:
    """Good inputs of every kind, and a few that are nearly good."""
    import torch

    two = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32), "__metadata__": {"format": "pt"}}
    many = {name: entry(name, [1], 8 * i, 8 * i + 8) for i, name in enumerate(("I64", "F64", "U64"))}
    empty = {"e": entry("F8_E4M3", [0, 5], 0, 0), "s": entry("BOOL", [], 0, 1)}
    found = [
        b"\x01" + bytes([size]) + json.dumps(header).encode() for size, header in ((32, two), (24, many), (1, empty))
    ]
    found += [b"\x00" + _framed(seed[1:]) for seed in found]
    index = {"weight_map": {"a": "a.safetensors", "b": "a.safetensors", "s": "b.safetensors", "e": "b.safetensors"}}
    shards = (bytes([32]) + json.dumps(two).encode(), bytes([1]) + json.dumps(empty).encode())
    gptq = {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False}
    }
    quantized = {"m.qweight": entry("I32", [1, 8], 0, 32), "m.scales": entry("F16", [1, 8], 32, 48)}
    quantized |= {"m.qzeros": entry("I32", [1, 1], 48, 52), "m.g_idx": entry("I32", [8], 52, 84)}
    found.append(b"\x02" + SPLIT.join((b'{"vocab_size": 2}', json.dumps(index).encode(), *shards)))
    found.append(b"\x02" + SPLIT.join((json.dumps(gptq).encode(), b"", bytes([84]) + json.dumps(quantized).encode())))
    shared = torch.arange(6.0)
    for value in (
        {"a": shared, "b": shared, "c": shared.view(2, 3).t(), "d": torch.ones(2, dtype=torch.int8)},
        {"n": 3},
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        found.append(b"\x03" + buffer.getvalue())
    return found


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One change: inside the JSON of a header, a configuration or an index where there is one, else to the bytes."""
    found = [match.span() for match in re.finditer(rb"\{.*\}", data.replace(SPLIT, b"\n\n"))]
    if found and data[0] % len(KINDS) in (1, 2) and rng.random() < 0.7:
        begin, end = rng.choice(found)
        try:
            document = json.loads(data[begin:end])
        except (ValueError, RecursionError):
            return _mutate_bytes(data, rng)
        return data[:begin] + _mutate_json(document, rng).encode("utf-8", "surrogatepass") + data[end:]
    return _mutate_bytes(data, rng)


def _mutate_json(document: Any, rng: random.Random) -> str:
    """One value, key or item of a JSON document replaced, removed, doubled or moved by a little."""
    places = list(_places(document))
    if not places:
        return json.dumps(rng.choice(VALUES))
    parent, key = rng.choice(places)
    old, action = parent[key], rng.randrange(5)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[str(rng.choice(VALUES))] = old
    elif action == 2 and type(old) is int:
        parent[key] = old + rng.choice((-8, -4, -1, 1, 4, 8))
    else:
        parent[key] = rng.choice(VALUES)
    text = json.dumps(document)
    return text.replace(f'"{key}"', f'"{rng.choice(VALUES)}"', 1) if rng.random() < 0.1 else text


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from _places(document[key])


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 1, 2, 4, 8, 40))
    new = rng.choice((b"", rng.randbytes(size), data[at : at + size] * 2, json.dumps(rng.choice(VALUES)).encode()))
    return data[:at] + new + data[at + rng.choice((0, size, len(new))) :]


def limit_memory() -> None:
    """From here on the process may take `MEMORY` more than it has; what asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))


def fuzz_random(seconds: float, seed: int, root: Path) -> dict[str, Any]:
    """Random mutations of the seeds; inputs that are read join them."""
    rng, pool, counts, findings = random.Random(seed), seeds(), {"read": 0, "refused": 0}, []
    for data in pool:  # loads what is loaded at first use
        check(data, root, seconds=60)
    limit_memory()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = rng.choice(pool)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = mutate(data, rng)
        try:
            counts[check(data, root)] += 1
        except Exception as error:  # noqa: BLE001 - a finding is whatever the reader lets out
            findings.append(f"{type(error).__name__}: {error} on {data!r}")
    total = sum(counts.values()) + len(findings)
    return {"engine": "random mutations", "executions": total, **counts, "findings": findings}


def fuzz_guided(root: Path, corpus: Path, options: list[str]) -> None:
    """libFuzzer's loop over the readers' coverage; ends the process."""
    atheris = import_module("atheris")
    with atheris.instrument_imports(include=["lowbit"]):
        for number, seed in enumerate(seeds()):
            check(seed, root, seconds=60)  # loads what is loaded at first use
            (corpus / f"seed{number}").write_bytes(seed)

    def change(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return mutate(data, rng)[:size] if rng.random() < 0.5 and data else bytes(atheris.Mutate(data, size))

    atheris.Setup([sys.argv[0], *options, str(corpus)], partial(check, root=root), custom_mutator=change)
    limit_memory()
    atheris.Fuzz()


def run_guided(seconds: float, seed: int, root: Path) -> dict[str, Any]:
    """The guided loop in a process of its own, and what it reported."""
    corpus = root / "corpus"
    corpus.mkdir()
    options = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", "-max_len=4096", "-print_final_stats=1", "-timeout=5"]
    options.append(f"-artifact_prefix={root.parent}/finding-")
    command = [sys.executable, __file__, "--guided", str(root / "input"), str(corpus), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    counts = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r"ft: (\d+) corp: (\d+)", done.stderr)
    return {
        "engine": "atheris (coverage-guided)",
        "executions": int(counts[1]) if counts else 0,
        "features, corpus": covered[-1] if covered else None,
        "findings": [done.stdout[-2000:] + done.stderr[-4000:]] if done.returncode else [],
    }


def main() -> int:
    """Fuzz for a while, print a table and JSON; 1 if there was a finding."""
    if sys.argv[1:2] == ["--guided"]:
        fuzz_guided(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("guided", "random"), default=None, help="default: guided where possible")
    options = parser.parse_args()
    if not options.engine:
        options.engine = "guided" if find_spec("atheris") else "random"
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        root = Path(folder) / "fuzz"
        root.mkdir()
        fuzz = run_guided if options.engine == "guided" else fuzz_random
        start = time.monotonic()
        result = fuzz(options.seconds, options.seed, root if options.engine == "guided" else root / "input")
        result["seconds"] = round(time.monotonic() - start, 1)
    for key, value in result.items():
        print(f"{key:18} {len(value) if key == 'findings' else value}")
    print(json.dumps(result))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
