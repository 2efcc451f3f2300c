"""An adapter that the `peft` package trained, beside a model on the kernels.

Its layers stand around ours, which stay as they are. Only safetensors are read, from a folder of this machine; what
`peft` would leave out or fill up without an error is one here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.runtime.model import Loaded
from lowbit.stages._adapter import CONFIG, WEIGHTS
from lowbit.stages._model import refusals, silent_transformers
from lowbit.stages._safetensors import read_safetensors
from lowbit.stages._weightfile import one_line, show
from lowbit.stages._words import counted


def add_adapter(loaded: Loaded, path: Path, note: Callable[[str], None]) -> str:
    """Put the layers of an adapter around those of a model, in place; what then computes, in words.

    Args:
        note: told what `peft` warns of.

    Raises:
        UsageError: `peft` is not installed, the folder holds no adapter, or one of a kind that is no layer.
        CheckpointError: a file is damaged, or the adapter belongs to another model.
    """
    _require_files(path)
    stored, base = read_safetensors(path / WEIGHTS).slots.keys(), loaded.checkpoint.path
    # What peft imports may greet on standard output, which is for the text.
    with redirect_stdout(sys.stderr), silent_transformers(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft = _peft()
        with refusals(f"{path / CONFIG} is no configuration of an adapter"):
            config = peft.PeftConfig.from_pretrained(str(path))
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise UnsupportedError(f"{path} holds an adapter of kind {_kind(config)}, which adds tokens and no layers")
        model: Any = loaded.model
        with refusals(f"the adapter in {path} does not fit {base}"):
            made: Any = peft.PeftModel.from_pretrained(model, str(path), torch_device="cpu").eval()
            wanted = peft.get_peft_model_state_dict(made, save_embedding_layers=False).keys()
    _require_all(wanted - stored, f"the adapter in {path} lacks")
    _require_all(
        stored - wanted, f"{base} has no place for all of the adapter in {path}: it has, beside what is taken,"
    )
    for words in {one_line(Exception(each.message)) for each in said if each.category is UserWarning}:
        note(f"peft: {words}")
    return f"the class of transformers, as peft adds {_kind(config)} of {counted(len(stored), 'tensor')} from {path}"


def _require_all(left: AbstractSet[str], what: str) -> None:
    """Raise CheckpointError for tensors that `peft` takes no notice of, or makes up."""
    if left:
        raise CheckpointError(f"{what} {counted(len(left), 'tensor')}, as {show(min(left))}")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"an adapter needs the package peft (pip install peft): {one_line(error)}") from None
    return peft


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _require_files(path: Path) -> None:
    """Raise UsageError where a folder is none of an adapter in safetensors."""
    missing = next((name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()), None)
    if missing == WEIGHTS and (path / "adapter_model.bin").exists():
        raise UsageError(
            f"{path} has its weights in adapter_model.bin, a pickle, which is not opened; save them as {WEIGHTS}"
        )
    if missing:
        raise UsageError(f"{path} holds no adapter: there is no {missing}; name the folder that peft saved it in")
