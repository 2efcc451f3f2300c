"""A tokenizer that is its `tokenizer.json` and nothing else, opened without `transformers`: that takes a second.

`transformers` changes what such a file says where the files beside it tell of tokens that it has not, or name a class
that makes a tokenizer of its own. Where none of that is so, it is handed on as it is; all else is left to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lowbit.errors import CheckpointError
from lowbit.stages._weightfile import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
else:  # the run-time check of annotations needs a name
    Tokenizer = object

# Classes that take a `tokenizer.json` as it is, and types of models for which `AutoTokenizer` chooses the one told.
CLASSES, TYPES = ("PreTrainedTokenizerFast", "TokenizersBackend"), ("llama", "qwen3")
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What `tokenizer_config.json` may say beside special tokens without a change of what is read here.
_HARMLESS = {
    "added_tokens_decoder", "backend", "chat_template", "clean_up_tokenization_spaces", "is_local", "local_files_only",
    "model_input_names", "model_max_length", "padding_side", "tokenizer_class", "truncation_side",
}  # fmt: skip
_BESIDE = ("added_tokens.json", "chat_templates", "special_tokens_map.json")


@final
@dataclass(frozen=True)
class PlainTokenizer:
    """What a GGUF file needs of a tokenizer.

    Attributes:
        document: its `tokenizer.json`.
        ids: of special tokens, by the names of transformers without `_token`.
        example: ids of the text "a".
        template: of chats, if there is one.
    """

    document: Mapping[str, Any]
    ids: Mapping[str, int]
    example: Sequence[int]
    template: str | None


def plain_tokenizer(root: Path, model_type: object) -> PlainTokenizer | None:
    """The tokenizer of a directory, or None where `transformers` has a say in it."""
    found = parsed_tokenizer(root, model_type)
    if found is None:
        return None
    tokenizer, ids, config = found
    beside, template = root / "chat_template.jinja", config.get("chat_template")
    template = beside.read_text(encoding="utf-8") if beside.exists() else template
    document, example = json.loads(tokenizer.to_str()), tokenizer.encode("a").ids
    return PlainTokenizer(document, ids, example, template if isinstance(template, str) else None)


def parsed_tokenizer(root: Path, model_type: object) -> tuple[Tokenizer, dict[str, int], Mapping[str, Any]] | None:
    """The same itself, the ids of its special tokens, and what else its configuration says."""
    if model_type not in TYPES or any((root / name).exists() for name in _BESIDE):
        return None
    try:
        config, stored = (read_json(root / name) for name in ("tokenizer_config.json", "tokenizer.json"))
        tokenizer = _parsed(root / "tokenizer.json")
    except CheckpointError:
        return None  # transformers says what is wrong
    special = {name: config.pop(f"{name}_token", None) for name in _NAMES}
    special = {name: token for name, token in special.items() if token is not None}
    if not _is_plain(config, special, stored):
        return None
    numbers = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    return tokenizer, {name: number for name, number in numbers.items() if number is not None}, config


def _parsed(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # it has no other
        raise CheckpointError(f"{path}: {error}") from error


def _is_plain(config: Mapping[str, Any], special: Mapping[str, object], stored: Mapping[str, Any]) -> bool:
    """Whether nothing beside a `tokenizer.json` adds to it; `config`: without the special tokens."""
    if config.get("tokenizer_class") not in CLASSES or set(config) - _HARMLESS:
        return False
    tokens, decoder = stored.get("added_tokens"), config.get("added_tokens_decoder")
    if not isinstance(tokens, list) or any(stored.get(name) is not None for name in ("padding", "truncation")):
        return False
    texts = [token["content"] for token in tokens]
    told = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens}
    return (decoder is None or decoder == told) and all(token in texts for token in special.values())
