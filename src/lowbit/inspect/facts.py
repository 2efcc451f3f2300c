"""What an inspection finds: plain records, their totals, and the one JSON document they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal, final

from lowbit.inspect.compare import Compared, Verdict, verdict
from lowbit.inspect.grids import OnGrid
from lowbit.inspect.names import Name

VERSION = 1
Level = Literal["error", "warning", "note"]


@final
@dataclass(frozen=True)
class Finding:
    """Something that is wrong (`error`), contradictory (`warning`) or worth knowing (`note`).

    About a tensor or, where that is None, about the whole.
    """

    level: Level
    tensor: str | None
    fact: str


@final
@dataclass(frozen=True)
class Codes:
    """How many of a grid's codes occur in a tensor."""

    used: int
    available: int


@final
@dataclass(frozen=True)
class TensorFacts:
    """One logical weight.

    Attributes:
        name: name of the float weight that it is or stands for.
        shape: shape of that weight.
        dtype: its dtype; for a quantized one, the dtype it is computed in.
        scheme: short name of the scheme; None where it is stored as it is.
        method: method that made it, where the checkpoint tells.
        kind: `quantized`, or why it is not: `embedding`, `output head`, `normalisation`, `vector`, `matrix`, ...
        nbytes: bytes of codes, scales and zero points, each in its own bits (of the elements, where not quantized).
        stored: bytes of all its tensors in the file: `nbytes` and what the layout adds.
        codes: codes that occur; None where not quantized or not readable.
        grid: of a float matrix, the grid that its values lie on; None where they are ordinary.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str | None
    method: str | None
    kind: str
    nbytes: int
    stored: int
    codes: Codes | None = None
    grid: OnGrid | None = None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """`8 * nbytes` over the number of weights."""
        return 8 * self.nbytes / max(self.parameters, 1)


@final
@dataclass(frozen=True)
class Group:
    """Weights of one kind and scheme together; bits per weight are those of `nbytes`."""

    kind: str
    scheme: str | None
    tensors: int
    parameters: int
    stored: int
    bits_per_weight: float


@final
@dataclass(frozen=True)
class Inspection:
    """Everything `lowbit inspect` says.

    Attributes:
        path: directory or file.
        container: `safetensors`, `pytorch`, `gguf` or `onnx`.
        files: bytes of each weight file, headers included.
        model: `model_type` and `architectures` of `config.json`, where there is one.
        format: name of the layout; None for a float checkpoint.
        declared: the checkpoint's own `quantization_config`, unchanged.
        made_by: who wrote it, as far as the files tell: tool to version or detail.
        tied: alias to the tensor whose values it shares.
        tensors: every weight, in file order.
        findings: what is wrong and what is worth knowing.
        name: what the name of the file or folder says.
        zero_points: how zero points are meant, each way once.
        original: the checkpoint that it was compared with; None where it was with none.
        compared: every quantized weight beside its original.
        changed: float tensors that are not as in the original, and how many are.
    """

    path: str
    container: str
    files: Mapping[str, int]
    model: Mapping[str, Any]
    format: str | None
    declared: Mapping[str, Any] | None
    made_by: Mapping[str, str]
    tied: Mapping[str, str]
    tensors: Sequence[TensorFacts]
    findings: Sequence[Finding]
    name: Name
    zero_points: Sequence[str] = ()
    original: str | None = None
    compared: Sequence[Compared] = ()
    changed: tuple[int, int] = (0, 0)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; warnings and notes do not count."""
        return all(finding.level != "error" for finding in self.findings)

    @property
    def verdict(self) -> Verdict | None:
        """What the weights look like together beside their originals; None where they were not compared."""
        return verdict(self.compared)

    @property
    def stored(self) -> Sequence[TensorFacts]:
        """The weights without those that share the storage of another."""
        return [facts for facts in self.tensors if facts.name not in self.tied]

    def bits_per_weight(self, *, quantized: bool) -> float:
        """Mean bits of the quantized weights, or of all weights; 0 where there are none."""
        chosen = [facts for facts in self.stored if facts.scheme or not quantized]
        return 8 * sum(facts.nbytes for facts in chosen) / max(sum(facts.parameters for facts in chosen), 1)

    def groups(self) -> list[Group]:
        """Weights by kind and scheme, the most bytes first."""
        members: dict[tuple[str, str | None], list[TensorFacts]] = {}
        for facts in self.stored:
            members.setdefault((facts.kind, facts.scheme), []).append(facts)
        groups = [_group(kind, scheme, found) for (kind, scheme), found in members.items()]
        return sorted(groups, key=lambda group: -group.stored)

    def to_dict(self) -> dict[str, Any]:
        """The whole as plain data for JSON, totals first."""
        tensors = [asdict(tensor) | {"bits_per_weight": tensor.bits_per_weight} for tensor in self.tensors]
        totals = {
            "parameters": sum(t.parameters for t in self.stored),
            "stored_bytes": sum(t.stored for t in self.stored),
            "bits_per_quantized_weight": self.bits_per_weight(quantized=True),
            "bits_per_weight": self.bits_per_weight(quantized=False),
            "groups": [asdict(group) for group in self.groups()],
        }
        seen = asdict(self.verdict) if self.verdict else None
        head = {"lowbit_inspect": VERSION, "sound": self.sound}
        return head | asdict(self) | {"verdict": seen, "totals": totals, "tensors": tensors}


def _group(kind: str, scheme: str | None, members: Sequence[TensorFacts]) -> Group:
    parameters = sum(facts.parameters for facts in members)
    bits = 8 * sum(facts.nbytes for facts in members) / max(parameters, 1)
    return Group(kind, scheme, len(members), parameters, sum(facts.stored for facts in members), bits)
