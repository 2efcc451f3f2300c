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
# Where a model's name has the first, llama.cpp takes it for Phi 3: special tokens take the spaces after them, but for
# three. It ends where one of these, or </s>, is not in the vocabulary. With the second [MASK] takes those before it.
_PHI, _MASKED = re.compile("(phi)-?(3)", re.IGNORECASE), re.compile("(modern)-(bert)", re.IGNORECASE)
_BARE = frozenset(("<unk>", "<s>", "<|endoftext|>"))
# What the tokenizer of transformers calls special tokens, and llama.cpp.
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def tokenizer_of(checkpoint: Checkpoint) -> PlainTokenizer:
    """The tokenizer that lies beside a checkpoint.

    Raises:
        CheckpointError: there is none.
        UnsupportedError: it has no `tokenizer.json`.
    """
    return plain_tokenizer(checkpoint.root, checkpoint.config.get("model_type")) or _of_transformers(checkpoint)


def model_name(name: str, tokenizer: PlainTokenizer) -> str:
    """What a model is called in its file: llama.cpp tells by it whether special tokens are those of Phi 3."""
    phi = _is_phi(tokenizer.document)
    name = _MASKED.sub(r"\1 \2", name if phi else _PHI.sub(r"\1 \2", name))
    return f"{name} Phi-3" if phi and not _PHI.search(name) else name


def _is_phi(document: Mapping[str, Any]) -> bool:
    """Whether special tokens take the spaces after them as llama.cpp has it for Phi 3."""
    added, model = document["added_tokens"], document["model"]
    special = {token["content"] for token in added} | {model.get("unk_token") or "<unk>"}
    known = {*special, *(model["vocab"] if isinstance(model["vocab"], Mapping) else ())}
    return {*_BARE, "</s>"} <= known and special - _BARE == {token["content"] for token in added if token["rstrip"]}


def cuts_of(tokenizer: PlainTokenizer) -> list[tuple[str, int]]:
    """What of a tokenizer llama.cpp does in another way, and how many tokens it is about."""
    document = tokenizer.document
    strips = ("lstrip", "single_word") if _is_phi(document) else ("lstrip", "rstrip", "single_word")
    found, tokens = list[tuple[str, int]](), document["added_tokens"]
    for strip in strips:
        texts = [token["content"] for token in tokens if token[strip]]
        if texts:
            found.append((f"added tokens, as {show(texts[0])}, are {strip}, which llama.cpp has not", len(texts)))
    scheme = re.search(r'"prepend_scheme": "(always|first)"', json.dumps(document.get("pre_tokenizer")))
    if scheme and document["model"].get("byte_fallback"):
        more = "" if scheme[1] == "always" else ", nor after a special token"
        text = f"prepend_scheme is {scheme[1]}: no space is put before one{more}, and llama.cpp puts one there"
        found.append((text, 1))
    return found


def tokenizer_values(checkpoint: Checkpoint, tokenizer: PlainTokenizer, size: int) -> dict[str, Value]:
    """Everything under `tokenizer.`; ids from the vocabulary's end to `size` are unused tokens.

    Raises:
        CheckpointError: it has more tokens than the model.
        UnsupportedError: it is neither byte-level BPE that `arch/pre.toml` knows nor BPE with bytes as a fallback.
    """
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
