"""What every test may use: where the embedded model is, and where larger data lies, if it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.annotations import check

check("lowbit")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of models and texts that are not ours to ship (`LOWBIT_SHARED`, default `../shared`); skips if absent."""
    path = Path(os.environ.get("LOWBIT_SHARED", ROOT.parent / "shared"))
    if not (path / "models").is_dir():
        pytest.skip(f"{path} has no models/; point LOWBIT_SHARED at a folder that has")
    return path


@pytest.fixture(scope="session")
def wiki_8m() -> Path:
    """Directory of the embedded model: Llama architecture, 8.4M parameters, BF16."""
    import lowbit

    return Path(lowbit.__file__).parent / "data" / "wiki-8m"
