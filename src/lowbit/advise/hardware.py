"""Hardware: profiles of `arch/hardware.toml`, and this machine as it is measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, final

from lowbit import native
from lowbit.errors import UsageError
from lowbit.stages.checkpoint import arch_rows
from lowbit.stages.record import machine

THIS = "this"
_READ = 2**28  # bytes of the array that is read to see how fast memory is
_FLAGS = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve", "bf16")


@final
@dataclass(frozen=True)
class Hardware:
    """A machine that a model may run on.

    Attributes:
        name, vendor, family: as in `arch/hardware.toml`.
        level: what kernels are chosen by: compute capability of NVIDIA, gfx number of AMD; 0 where none counts.
        memory: bytes that weights and cache may be in; 0 where that is not known.
        bandwidth: bytes a second of that memory.
        source: of these figures.
        measured: whether the bandwidth was measured; else it is the vendor's peak.
        features: instruction sets, of this machine.
    """

    name: str
    vendor: str
    family: str
    level: float
    memory: int
    bandwidth: float
    source: str
    measured: bool = False
    features: tuple[str, ...] = ()

    @property
    def maker(self) -> str:
        """The vendor, with the level where kernels are chosen by one: `nvidia 9`."""
        return f"{self.vendor} {self.level:g}" if self.vendor in ("nvidia", "amd") else self.vendor


@cache
def profiles() -> tuple[Hardware, ...]:
    """All profiles, in the file's order."""
    return tuple(_profile(row) for row in arch_rows("hardware"))


def _profile(row: dict[str, Any]) -> Hardware:
    memory, bandwidth = int(row["memory"] * 1e9), row["bandwidth"] * 1e9
    return Hardware(row["name"], row["vendor"], row["family"], float(row["level"]), memory, bandwidth, row["source"])


def find(name: str) -> Hardware:
    """The profile of that name, or this machine.

    Raises:
        UsageError: none is called so; the text has the nearest names.
    """
    if name == THIS:
        return probe()
    wanted = _spelled(name)
    names = {
        _spelled(each): row["name"] for row in arch_rows("hardware") for each in (row["name"], *row.get("also", ()))
    }
    if wanted not in names:
        near = list(dict.fromkeys(names[each] for each in get_close_matches(wanted, names, 4, 0.5)))
        inside = [names[each] for each in names if wanted and (wanted in each or each in wanted)]
        found = ", ".join(dict.fromkeys([*near, *inside])) or ", ".join(dict.fromkeys(names.values()))
        raise UsageError(f"no hardware is called {name!r}; near it: {found}; or `this`")
    return next(each for each in profiles() if each.name == names[wanted])


def _spelled(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def probe() -> Hardware:
    """This machine: its first GPU where torch sees one, else its processor; the bandwidth is measured by reading."""
    import torch

    if torch.cuda.is_available():
        return _gpu(torch)
    facts, flags = machine(), _flags()
    vendor = "x86" if "avx2" in flags or native.isa().startswith("avx") else "arm"
    level = {"avx512_vnni": 512.0, "avx512": 512.0, "avx2": 2.0}.get(native.isa(), 0.0)
    array = torch.ones(_READ // 8, dtype=torch.int64)
    rate = _READ / min(_seconds(array.sum) for _ in range(5))
    source = f"measured: torch sums {_READ >> 20} MiB on {torch.get_num_threads()} threads, the best of five"
    return Hardware(THIS, vendor, facts.cpu, level, facts.memory, rate, source, True, flags)


def _gpu(torch: Any) -> Hardware:
    """The first GPU; CUDA's name for it also says whether it is AMD's."""
    facts = torch.cuda.get_device_properties(0)
    amd = getattr(facts, "gcnArchName", "") if torch.version.hip else ""
    number = re.match(r"gfx(\d+)", amd)
    level = float(number[1]) if number else facts.major + facts.minor / 10
    array = torch.ones(_READ // 2, dtype=torch.int64, device="cuda")

    def read() -> None:
        array.sum()
        torch.cuda.synchronize()

    rate = 4 * _READ / min(_seconds(read) for _ in range(5))
    source = f"measured: torch sums {4 * _READ >> 20} MiB, the best of five"
    return Hardware(THIS, "amd" if amd else "nvidia", facts.name, level, facts.total_memory, rate, source, True)


def _flags() -> tuple[str, ...]:
    """What the processor says that it can, of what kernels ask for."""
    info = Path("/proc/cpuinfo")
    said = set(info.read_text().split()) if info.exists() else set()
    return tuple(flag for flag in _FLAGS if flag in said)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
