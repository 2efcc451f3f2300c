"""A tokenizer of `transformers` as the keys from which llama.cpp makes its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.stages._gguf import Value
from lowbit.stages._model import open_tokenizer
from lowbit.stages._plain_tokenizer import PlainTokenizer, plain_tokenizer
from lowbit.stages._weightfile import show
from lowbit.stages.checkpoint import Checkpoint, arch_rows

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_BYTES = re.compile(r"<0x[0-9A-F]{2}>")
# What the tokenizer of transformers calls special tokens, and llama.cpp.
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def tokenizer_values(checkpoint: Checkpoint, size: int) -> dict[str, Value]:
    """Everything under `tokenizer.`; ids from the vocabulary's end to `size` are unused tokens.

    Raises:
        CheckpointError: there is no tokenizer, or it has more tokens than the model.
        UnsupportedError: it is neither byte-level BPE that `arch/pre.toml` knows nor BPE with bytes as a fallback.
    """
    tokenizer = plain_tokenizer(checkpoint.root, checkpoint.config.get("model_type")) or _of_transformers(checkpoint)
    document = tokenizer.document
    model = document["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"{checkpoint.path}: a tokenizer of type {show(model.get('type'))} is not written to GGUF"
        )
    tokens, kinds = _tokens(document, size)
    found: dict[str, Value] = {}
    if model.get("byte_fallback"):
        found["tokenizer.ggml.model"] = "llama"
        found["tokenizer.ggml.tokens"] = tokens
        found["tokenizer.ggml.scores"] = _scores(tokens, model)
        kinds = [
            _BYTE if kind == _NORMAL and _BYTES.fullmatch(token) else kind
            for token, kind in zip(tokens, kinds, strict=True)
        ]
    else:
        found["tokenizer.ggml.model"] = "gpt2"
        found["tokenizer.ggml.pre"] = _pre(checkpoint, document)
        found["tokenizer.ggml.tokens"] = tokens
    unknown = model.get("unk_token")
    if model.get("byte_fallback") and unknown in tokens:
        kinds[tokens.index(unknown)] = _UNKNOWN
    found["tokenizer.ggml.token_type"] = kinds
    if not model.get("byte_fallback"):
        found["tokenizer.ggml.merges"] = [
            " ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]
        ]
    return found | _special(tokenizer)


def _of_transformers(checkpoint: Checkpoint) -> PlainTokenizer:
    tokenizer: Any = open_tokenizer(checkpoint)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(f"{checkpoint.path}: the tokenizer has no tokenizer.json, from which GGUF's is made")
    numbers = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    ids = {name: int(number) for name, number in numbers.items() if number is not None}
    template = getattr(tokenizer, "chat_template", None)
    example, template = tokenizer("a")["input_ids"], template if isinstance(template, str) else None
    return PlainTokenizer(json.loads(backend.to_str()), ids, example, template)


def _tokens(document: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and kind of each token, by id."""
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    entries = [(text, number, _NORMAL) for text, number in document["model"]["vocab"].items()]
    entries += [(t["content"], t["id"], _CONTROL if t["special"] else _USER) for t in document["added_tokens"]]
    for text, number, kind in entries:
        if not 0 <= number < size:
            raise CheckpointError(f"the tokenizer has a token {show(text)} of id {number}, the model knows {size:,}")
        tokens[number], kinds[number] = text, kind
    return tokens, kinds


def _scores(tokens: list[str], model: Mapping[str, Any]) -> list[float]:
    """llama.cpp joins the pair whose whole scores highest: the rank of the first merge that makes it, negated."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _pre(checkpoint: Checkpoint, document: Mapping[str, Any]) -> str:
    """llama.cpp's name of what splits the text before BPE, found by what it does."""
    normalizer = document.get("normalizer")
    facts = {
        "normalizer": normalizer["type"] if normalizer else "",
        "splits": _splits(document.get("pre_tokenizer")),
        "ignore_merges": bool(document["model"].get("ignore_merges")),
    }
    for row in arch_rows("pre"):
        if all(facts[key] == row[key] for key in facts):
            return str(row["name"])
    raise UnsupportedError(
        f"{checkpoint.path}: no pre-tokenizer that llama.cpp has is known to do the same as {show(facts)}"
    )


def _splits(part: Any) -> list[str]:
    """The steps of a pre-tokenizer as texts: patterns, and the words of `arch/pre.toml`."""
    if not isinstance(part, Mapping):
        return []
    if part["type"] == "Sequence":
        return [step for each in part["pretokenizers"] for step in _splits(each)]
    if part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return [str(part["pattern"].get("Regex"))]
    if part["type"] == "Digits" and part.get("individual_digits"):
        return ["digits"]
    if part["type"] == "Digits":
        return ["numbers"]
    if part["type"] == "Punctuation" and part.get("behavior") == "Contiguous":
        return ["punctuation"]
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        return ["bytes" if part.get("use_regex", True) else "plain bytes"]
    return [json.dumps(part, sort_keys=True)]


def _special(tokenizer: PlainTokenizer) -> dict[str, Value]:
    """Ids of special tokens, whether texts begin and end with one, and the chat template."""
    found: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": tokenizer.ids[theirs]
        for theirs, name in _SPECIAL.items()
        if theirs in tokenizer.ids
    }
    ids = tokenizer.example
    found["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.ids.get("bos")
    found["tokenizer.ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.ids.get("eos")
    if tokenizer.document["model"].get("byte_fallback"):
        found["tokenizer.ggml.add_space_prefix"] = _prefixes(tokenizer.document)
    return found | ({} if tokenizer.template is None else {"tokenizer.chat_template": tokenizer.template})


def _prefixes(document: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    text = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text
