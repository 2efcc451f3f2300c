"""Texts to tokens and back; without transformers, which takes a second to import, where it would change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from lowbit.errors import UsageError
from lowbit.stages._gguf import Gguf, read_gguf
from lowbit.stages._gguf_vocabulary import alone, ends_of, tokenizer_documents
from lowbit.stages._model import open_tokenizer
from lowbit.stages._plain_tokenizer import parsed_tokenizer
from lowbit.stages.checkpoint import Checkpoint


@final
@dataclass(frozen=True)
class Words:
    """What makes a text the tokens of a prompt, what joins tokens without special ones, ends of a text, and those."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    ends: frozenset[int]
    special: Mapping[str, int]


def require_text(text: str, what: str) -> None:
    """What a program is given in bytes that are no UTF-8 has halves of surrogate pairs in their place.

    Raises:
        UsageError: this text has some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is no UTF-8: what stands at character {error.start + 1} is none") from None


def open_words(checkpoint: Checkpoint) -> Words:
    """Those of a checkpoint.

    Raises:
        LowbitError: as `open_tokenizer`.
    """
    found = plain_words(checkpoint)
    if found:
        return found
    asked: Any = open_tokenizer(checkpoint)
    header = _header(checkpoint)
    ends = _ends(header, asked.eos_token_id, (asked.get_vocab() if header else {}).get)
    decode, special = partial(asked.decode, skip_special_tokens=True), _special(asked.added_tokens_decoder)
    return Words(lambda text: asked(text).input_ids, decode, ends, special)


def plain_words(checkpoint: Checkpoint) -> Words | None:
    """The same where transformers would change nothing; else None."""
    header = _header(checkpoint)
    found = (_of_file(header) if header else None) or _of_directory(checkpoint)
    if found is None:
        return None
    tokenizer, end = found
    ends, special = _ends(header, end, tokenizer.token_to_id), _special(tokenizer.get_added_tokens_decoder())
    return Words(lambda text: tokenizer.encode(text).ids, tokenizer.decode, ends, special)


def _header(checkpoint: Checkpoint) -> Gguf | None:
    """Of a GGUF file that has the tokenizer."""
    return read_gguf(checkpoint.shards[0]) if alone(checkpoint, "tokenizer_config.json") else None


def _ends(header: Gguf | None, end: int | None, find: Callable[[str], int | None]) -> frozenset[int]:
    """Of a text: the one that a tokenizer has, and those that a GGUF file knows beside it."""
    told = ends_of(header, find) if header else frozenset[int]()
    return told if end is None else told | {end}


def _special(added: Mapping[int, Any]) -> dict[str, int]:
    """Tokens that `decode` leaves out, by their text."""
    return {token.content: number for number, token in added.items() if token.special}


def _of_directory(checkpoint: Checkpoint) -> tuple[Any, int | None] | None:
    found = parsed_tokenizer(checkpoint.root, checkpoint.config.get("model_type"))
    if found is None:
        return None
    tokenizer, ids, config = found
    return None if config.get("clean_up_tokenization_spaces") else (tokenizer, ids.get("eos"))


def _of_file(header: Gguf) -> tuple[Any, int | None] | None:
    """The tokenizer in a GGUF file, if it has its special tokens as such."""
    documents = tokenizer_documents(header)
    document, config = documents["tokenizer.json"], documents["tokenizer_config.json"]
    ids = {token["content"]: int(token["id"]) for token in document["added_tokens"] if token["special"]}
    special = {name: token for name, token in config.items() if name.endswith("_token")}
    if not set(special.values()) <= ids.keys():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(document)), ids.get(str(special.get("eos_token")))
