"""What is checked against annotations while tests run (`tests/annotations.py`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.annotations import check

MODULE = """
from __future__ import annotations
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown

Square = Float[Tensor, "n n"]

@dataclass(frozen=True)
class Pair:
    left: Float[Tensor, "n"]
    right: Float[Tensor, "n"] | None

    def twice(self, times: int) -> int:
        return 2 * times

def same(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> None: ...

def cut(a: Float[Tensor, "n m"]) -> Float[Tensor, "m"]:
    return a[:, 0]

def square(a: Square) -> list[Float[Tensor, "n"]]:
    return list(a[:1] if len(a) > 2 else a[:, :1])

def inner(a: Float[Tensor, "n"], b: object) -> object:
    def within(c: Float[Tensor, "n"], d: int) -> int:
        return d
    return within(a[:1], b)

def parts(a: Float[Tensor, "n"]) -> Iterator[Float[Tensor, "1"]]:
    for i in range(len(a)):
        yield a[i : i + 1]

def unknown(a: Unknown, b: str) -> str:
    return b
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, before = tmp_path_factory.mktemp("made"), list(sys.meta_path)
    (folder / "checked_here.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    check("checked_here")
    yield import_module("checked_here")
    sys.meta_path[:] = before
    sys.path.remove(str(folder))
    assert [path.name for path in folder.iterdir()] == ["checked_here.py"], "nothing that runs without checks could use"


def test_what_agrees_passes(made: Any) -> None:
    three = torch.ones(3)
    made.same(three, three)
    assert made.Pair(three, None).twice(2) == 4
    assert made.cut(torch.ones(2, 2)).shape == (2,)
    assert len(made.square(torch.ones(3, 3))) == 1
    assert made.inner(three, 5) == 5
    assert [len(part) for part in made.parts(three)] == [1, 1, 1]
    assert made.unknown(object(), "b") == "b"


BROKEN: dict[str, Any] = {
    "sizes of two arguments": lambda made: made.same(torch.ones(3), torch.ones(4)),
    "a dtype": lambda made: made.same(torch.ones(3, dtype=torch.int32), torch.ones(3)),
    "a size that is returned": lambda made: made.cut(torch.ones(2, 3)),
    "a size in an alias": lambda made: made.square(torch.ones(2, 3)),
    "a size within what is returned": lambda made: made.square(torch.ones(2, 2)),
    "an argument without a shape": lambda made: made.inner(torch.ones(3), "five"),
    "sizes of a dataclass": lambda made: made.Pair(torch.ones(3), torch.ones(4)),
    "an argument of a method": lambda made: made.Pair(torch.ones(3), None).twice("2"),
    "an argument beside one that mypy alone knows": lambda made: made.unknown(object(), 3),
    "an argument of a generator": lambda made: made.parts(torch.ones(3, 3)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_is_refused(what: str, made: Any) -> None:
    with pytest.raises(TypeCheckError):
        BROKEN[what](made)
