"""Any damage to a GGUF header is read rightly or refused in one sentence."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.stages._gguf_model import open_gguf
from tests.hostile.cases import gguf_bytes, gguf_entry, gguf_key, gguf_text


def test_any_damage_is_refused_or_read(tmp_path: Path) -> None:
    """The fuzzer's property, for GGUF: an error of ours in one sentence, or a file whose tensors lie in it."""
    keys = [
        gguf_key("general.architecture", 8, gguf_text("llama")),
        gguf_key("a", 9, struct.pack("<IQ", 8, 1) + gguf_text("x")),
    ]
    good = gguf_bytes(
        [gguf_entry("output.weight", (32, 2)), gguf_entry("output_norm.weight", (32,), offset=256)], keys, 384
    )
    rng, path, refused, read = random.Random(0), tmp_path / "m.gguf", 0, 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) - 384)
            data[at] = rng.choice([0, 1, 2, 8, 9, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        try:
            for slot in open_gguf(path).files[0].slots.values():
                assert 0 < slot.start <= slot.stop <= path.stat().st_size
            read += 1
        except LowbitError as error:
            refused += str(path) in str(error) and str(error).isprintable()
    assert refused + read == 1500 and refused > 200 and read > 20
