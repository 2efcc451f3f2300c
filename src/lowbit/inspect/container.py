"""Which container a file is, by its first bytes; names of files lie."""

from __future__ import annotations

from pathlib import Path

_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def sniff(path: Path) -> str | None:
    """`gguf`, `safetensors`, `pytorch`, `tflite`, `executorch`, `ggml` or `hdf5`; None where it is none of these.

    ONNX files have no mark and are not told.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(10)
    starts = {b"GGUF": "gguf", b"PK\x03\x04": "pytorch", b"\x80\x02": "pytorch", b"\x89HDF": "hdf5"}
    starts |= dict.fromkeys((b"lmgg", b"fmgg", b"tjgg", b"algg"), "ggml")  # `ggml`, `ggmf`, `ggjt`, `ggla`, swapped
    found = next((kind for mark, kind in starts.items() if head.startswith(mark)), None)
    later = {b"TFL3": "tflite", b"ET12": "executorch"}.get(head[4:8])
    header = int.from_bytes(head[:8], "little")
    safe = head[8:9] == b"{" and 2 <= header <= min(_LARGEST_HEADER, path.stat().st_size)
    return found or later or ("safetensors" if safe else None)
