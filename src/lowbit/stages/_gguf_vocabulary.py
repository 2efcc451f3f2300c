"""The tokenizer in a GGUF file as `tokenizer.json` and `tokenizer_config.json` of transformers.

Byte-level BPE splits a text as `arch/pre.toml` says of its name. Vocabularies of SentencePiece join the pair whose
whole scores highest: every way to cut a token in two is a merge, ranked by the token's score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowbit.errors import UnsupportedError
from lowbit.stages._directory import GGUF
from lowbit.stages._gguf import Gguf, read_gguf
from lowbit.stages._weightfile import show
from lowbit.stages.checkpoint import Checkpoint, arch_rows

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}
# What tokens at which llama.cpp ends a text are called, whatever a file says of them.
_ENDS = frozenset((
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
    "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
))  # fmt: skip
_CHANNELS = frozenset(("<|return|>", "<|call|>"))  # where these end a text, as of gpt-oss, <|end|> parts it


def told_by(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """What a GGUF file tells and no file beside it: files to write beside another container, JSON by name.

    The tokenizer is missing where no other program is known to cut texts as llama.cpp does with it (`untold`).
    """
    found: dict[str, dict[str, Any]] = {"config.json": dict(checkpoint.config)} if alone(checkpoint) else {}
    told = _told(checkpoint)
    return found if isinstance(told, str) else found | told


def alone(checkpoint: Checkpoint, *names: str) -> bool:
    """Whether it is a GGUF file with none of these files beside it: by default, with no configuration."""
    beside = (checkpoint.root / name for name in names or ["config.json"])
    return checkpoint.shards[0].suffix == GGUF and not any(file.exists() for file in beside)


def untold(checkpoint: Checkpoint) -> str | None:
    """Why a GGUF file's tokenizer is not written in the files of transformers; None where it is, or lies beside it."""
    told = _told(checkpoint)
    return told if isinstance(told, str) else None


def _told(checkpoint: Checkpoint) -> dict[str, dict[str, Any]] | str:
    """Files of the tokenizer that is in a GGUF file and not beside it, or why there are none; empty for others."""
    if not alone(checkpoint, *_FILES):
        return {}
    try:
        return tokenizer_documents(read_gguf(checkpoint.shards[0]))
    except UnsupportedError as error:
        return str(error)


def tokenizer_documents(header: Gguf) -> dict[str, dict[str, Any]]:
    """Both files, by name.

    Raises:
        UnsupportedError: no tokenizer, or a kind that is not known.
    """
    kind, tokens = header.value("tokenizer.ggml.model"), header.value("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UnsupportedError(f"{header.path} has no tokenizer in it")
    types = header.value("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise UnsupportedError(f"{header.path}: types are not given for each of {len(tokens):,} tokens")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(f"{header.path} has a tokenizer of kind {show(kind)}; gpt2 and llama are known")
    made = _byte_level(header, tokens, types) if kind == "gpt2" else _sentencepiece(header, tokens, types)
    ids = _specials(header, tokens)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        **made,
        "post_processor": _ends(header, tokens, made["post_processor"], kind == "llama"),
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{_SPECIAL[name]}_token": tokens[number] for name, number in ids.items()}
    template = header.value("tokenizer.chat_template")
    config |= {"chat_template": template} if isinstance(template, str) else {}
    return {"tokenizer.json": document, "tokenizer_config.json": config}


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Text to id, without what only fills the table up."""
    kept = [(text, number) for number, text in enumerate(tokens) if types[number] != _UNUSED]
    return dict(reversed(kept))  # of equal texts the first counts


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut: those of control, and the user's own."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": text, **plain, "special": types[number] != _USER}
        for number, text in enumerate(tokens)
        if types[number] in (_CONTROL, _USER, _UNKNOWN)
    ]


def _byte_level(header: Gguf, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    name, merges = header.value("tokenizer.ggml.pre"), header.value("tokenizer.ggml.merges")
    row = next((row for row in arch_rows("pre") if row["name"] == name), None)
    if row is None:
        known = ", ".join(row["name"] for row in arch_rows("pre"))
        raise UnsupportedError(f"{header.path} has a tokenizer that splits as {show(name)}; {known} are known")
    if not isinstance(merges, list) or not all(isinstance(pair, str) and " " in pair for pair in merges):
        raise UnsupportedError(f"{header.path} has a tokenizer of BPE without its merges")
    steps = [_step(step) for step in row["splits"]]
    bpe = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
           "fuse_unk": False, "byte_fallback": False, "ignore_merges": row["ignore_merges"]}  # fmt: skip
    pairs = [pair.split(" ", 1) for pair in merges]
    return {
        "normalizer": {"type": row["normalizer"]} if row["normalizer"] else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": name == "llama-bpe",
        "decoder": _step("plain bytes"),
        "model": {"type": "BPE", **bpe, "vocab": _vocabulary(tokens, types), "merges": pairs},
    }


def _step(step: str) -> dict[str, Any]:
    """One step of a pre-tokenizer, in the words of `arch/pre.toml`."""
    if step in ("digits", "numbers"):
        return {"type": "Digits", "individual_digits": step == "digits"}
    if step == "punctuation":
        return {"type": "Punctuation", "behavior": "Contiguous"}
    if step in ("bytes", "plain bytes"):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": step == "bytes"}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _sentencepiece(header: Gguf, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    scores = header.value("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UnsupportedError(f"{header.path} has a tokenizer of SentencePiece without a score for each token")
    prefix = header.value("tokenizer.ggml.add_space_prefix", True) is True
    unknown = header.value("tokenizer.ggml.unknown_token_id")
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    bpe = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
           "byte_fallback": True, "ignore_merges": False}  # fmt: skip
    vocabulary = _vocabulary(tokens, types)
    unk = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    merges = _merges(vocabulary, types, scores)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*steps, visible]},
        "pre_tokenizer": None,
        "post_processor": True,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", **bpe, "unk_token": unk, "vocab": vocabulary, "merges": merges},
    }


def _merges(vocabulary: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Every pair of tokens that is one, the best first; among those that make one token, as its parts are numbered."""
    found = []
    for text, number in vocabulary.items():
        if types[number] != _NORMAL:
            continue
        for at in range(1, len(text)):
            left, right = vocabulary.get(text[:at]), vocabulary.get(text[at:])
            if left is not None and right is not None:
                found.append((-scores[number], number, left, right, text, at))
    return [[text[:at], text[at:]] for *_, text, at in sorted(found)]


def _specials(header: Gguf, tokens: Sequence[str]) -> dict[str, int]:
    """llama.cpp's names of the special tokens that there are, to their ids."""
    told = {name: header.value(f"tokenizer.ggml.{name}_token_id") for name in _SPECIAL}
    return {name: number for name, number in told.items() if isinstance(number, int) and 0 <= number < len(tokens)}


def ends_of(header: Gguf, find: Callable[[str], int | None]) -> frozenset[int]:
    """Tokens at which llama.cpp ends a text: those that the file names as such, and those that are called so.

    `find` has the token of a text: whoever asks has the vocabulary, and to read it again takes tens of milliseconds.
    """
    tokens = header.fields.get("tokenizer.ggml.tokens")
    named = [header.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    called = {text: number for text in _ENDS if (number := find(text)) is not None}
    if called.keys() >= _CHANNELS:
        called.pop("<|end|>", None)
    count = tokens.count if tokens else 0
    return frozenset([*called.values(), *(each for each in named if isinstance(each, int) and 0 <= each < count)])


def _ends(header: Gguf, tokens: Sequence[str], begins: bool, pieces: bool) -> dict[str, Any] | None:
    """What is put around a text; `begins`: whether llama.cpp begins it with a token where the file does not say."""
    ids, wishes = _specials(header, tokens), {"bos": begins, "eos": False}
    wanted = {name: header.value(f"tokenizer.ggml.add_{name}_token", wish) is True for name, wish in wishes.items()}
    around = {name: tokens[ids[name]] for name, wish in wanted.items() if wish and name in ids}
    if not around:
        return None if pieces else _step("plain bytes")
    first, last = ([{"SpecialToken": {"id": around[name], "type_id": 0}}] if name in around else [] for name in wanted)
    texts = [[{"Sequence": {"id": part, "type_id": kind}}] for kind, part in enumerate("AB")]
    special = {text: {"id": text, "ids": [ids[name]], "tokens": [text]} for name, text in around.items()}
    second = [{"SpecialToken": {**each["SpecialToken"], "type_id": 1}} for each in first]
    return {
        "type": "TemplateProcessing",
        "single": [*first, *texts[0], *last],
        "pair": [*first, *texts[0], *last, *second, *texts[1], *last],
        "special_tokens": special,
    }
