"""llama.cpp's own `ggml_quantize_chunk`, from the library that llama-cpp-python carries."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@cache
def library() -> ctypes.CDLL:
    """The library, without its Python module, which would load a model's whole runtime."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("compares with llama-cpp-python, which is not installed")
    loaded = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return loaded


def quantize(number: int, weight: Floats, importance: Floats | None, row_bytes: int) -> Bytes:
    """Rows of blocks of the type with this number."""
    rows, cols = weight.shape
    out = np.zeros((rows, row_bytes), np.uint8)
    at = None if importance is None else importance.ctypes.data
    written = library().ggml_quantize_chunk(number, weight.ctypes.data, out.ctypes.data, 0, rows, cols, at)
    assert written == out.size
    return out
