"""PyTorch `.bin` and `.pt` files: only tensors, no code, nothing loaded.

Such a file is a zip archive of uncompressed records: a pickle that describes the tensors, and one record per storage.
`torch.load` reads the pickle alone (`weights_only`, onto the meta device); the bytes are then mapped by us, for its own
`mmap=True` asks for a writable mapping of the whole file, which Linux refuses for files larger than the memory.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.formats import Spec
from lowbit.stages._weightfile import DTYPES, TEXT_LIMIT, Slot, WeightFile, one_line, open_regular, show

_ENCRYPTED = 1  # the bit of a zip record's flags
_AGAIN = "save it again with torch.save of a plain state_dict, or as safetensors"


def read_torch(path: Path) -> WeightFile:
    """Check a PyTorch file and list its tensors in the order of the saved dictionary.

    A checkpoint whose weights lie one level down, under `state_dict` or `model`, is read there. Names that share
    storage are tied to the first of them.

    Raises:
        CheckpointError: not readable, truncated, compressed, older than PyTorch 1.6, holding code, or a tensor that is
            not a plain strided one inside its own record.
    """
    size, records = _records(path)
    slots: dict[str, Slot] = {}
    skipped: list[str] = []
    for name, value in _entries(path).items():
        if not isinstance(name, str) or not name.isprintable():
            raise CheckpointError(f"{path}: tensor {show(name)}: the name is no printable text")
        if isinstance(value, Tensor):
            slots[name] = _slot(f"{path}: tensor {show(name)}", value, records)
        else:
            skipped.append(name)
    first: dict[Slot, str] = {}
    tied = {name: first[slot] for name, slot in slots.items() if slot.extent and first.setdefault(slot, name) != name}
    return WeightFile(path, size, slots, tied, skipped)


def _records(path: Path) -> tuple[int, dict[int, int]]:
    """Size of the file; first byte of every record in the archive, and how many bytes it has."""
    with open_regular(path) as file:
        size, found = os.fstat(file.fileno()).st_size, {}
        try:
            archive = zipfile.ZipFile(file)
            for info in archive.infolist():
                _check_record(path, info)
                file.seek(info.header_offset + 26)
                begin = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                if begin + info.file_size > size:
                    raise CheckpointError(f"{path}: record {show(info.filename)} reaches beyond the end of the file")
                found[begin] = info.file_size
            _check_byte_order(path, archive)
        except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, OSError, struct.error) as error:
            raise CheckpointError(
                f"{path} is no zip archive as PyTorch 1.6 and later write it ({one_line(error)}); "
                f"it is damaged, or older: {_AGAIN}"
            ) from None
    return size, found


def _check_record(path: Path, info: zipfile.ZipInfo) -> None:
    where = f"{path}: record {show(info.filename)}"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & _ENCRYPTED:
        raise CheckpointError(f"{where} is compressed or encrypted, which PyTorch never does; {_AGAIN}")
    if "/data/" not in info.filename and info.file_size > TEXT_LIMIT:
        raise CheckpointError(f"{where} has {info.file_size:,} bytes, more than the {TEXT_LIMIT:,} allowed")
    if info.filename.endswith("/constants.pkl"):
        raise CheckpointError(f"{path} is a TorchScript program, not weights; {_AGAIN}")


def _check_byte_order(path: Path, archive: zipfile.ZipFile) -> None:
    for name in archive.namelist():
        order = archive.read(name) if name.endswith("/byteorder") else sys.byteorder.encode()
        if order != sys.byteorder.encode():
            raise CheckpointError(f"{path} has the byte order {show(order)}, this machine is {sys.byteorder}-endian")


def _entries(path: Path) -> Mapping[Any, Any]:
    """The saved dictionary, its tensors on the meta device."""
    try:
        data = torch.load(path, map_location="meta", weights_only=True)
    except UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+) (was not|whose)", str(error))
        found = f"refers to {show(culprit[1])}" if culprit else "holds more than tensors, or is damaged"
        raise CheckpointError(f"{path}: its pickle {found}, and loading it could run code; {_AGAIN}") from None
    except Exception as error:  # noqa: BLE001 - torch's unpickler fails in whatever way a damaged pickle leads it to
        raise CheckpointError(f"{path} is not a readable PyTorch file: {one_line(error)}") from None
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__} where a dictionary of tensors should be")
    return data


def _slot(where: str, tensor: Tensor, records: Mapping[int, int]) -> Slot:
    """A tensor on the meta device as a place in the file, checked against the archive's own list of records."""
    spec = Spec(tensor.dtype, tuple(tensor.shape))
    if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided or tensor.is_neg():
        raise CheckpointError(f"{where}: {tensor.layout} tensors of {tensor.dtype} cannot be read; {_AGAIN}")
    if not tensor.numel():
        return Slot(spec, 0, 0)
    extent = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    record: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    start = int(tensor.storage_offset())
    end = start + extent
    if record not in records or end * tensor.dtype.itemsize > records[record]:
        raise CheckpointError(f"{where}: elements {start:,} to {end:,} are not in the record that it names")
    if tensor.numel() > extent:
        raise CheckpointError(f"{where}: shape {show(list(tensor.shape))} repeats {extent:,} stored elements; {_AGAIN}")
    stride = None if tensor.is_contiguous() else tensor.stride()
    return Slot(spec, record + start * tensor.dtype.itemsize, extent, stride)
