"""Build every causal language model of `transformers` small and at random; compare logits with lowbit's, bit for bit.

    python benchmarks/architectures.py [--only NAME ...] [--quantize METHOD] [--json]

lowbit fills the model once as a whole and once one block at a time, as `lowbit evaluate --ram` does. Model types whose
configuration cannot be made small by the settings below, or that do not run by themselves on tokens, are listed.

With `--quantize`, as `gptq`, each is quantized to `int8-g16` instead, calibrated on words drawn at random. Said is by
how much its logits change, and by how much those of the kernels on exact inputs differ from everything dequantized.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import lowbit
from lowbit.errors import LowbitError
from lowbit.stages._model import open_blueprint
from lowbit.stages.checkpoint import open_checkpoint

_LARGEST = 30_000_000
_WIDTHS = {
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "head_dim": 16,
}
_INNER = dict.fromkeys(
    ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size",
     "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 96,
)  # fmt: skip
_LAYERS = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"), 2)
_HEADS = dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads"), 4)
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_OTHER = {"vocab_size": 256, "max_position_embeddings": 64, "n_positions": 64, "num_key_value_heads": 2,
          "state_size": 8, "mamba_d_state": 8, "rotary_dim": 8}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS = _WIDTHS | _INNER | _LAYERS | _HEADS | _EXPERTS | _LATENT | _OTHER | _TOKENS
# Where heads of latent attention have a width of their own, `head_dim` and fewer key heads contradict it.
VARIANTS: tuple[dict[str, int | None], ...] = ({}, {"head_dim": None, "num_key_value_heads": 4}, {"head_dim": None})


def small_model(name: str, variant: dict[str, int | None]) -> Any:
    """A small random model of a type; its weights are large enough for a wrong one to be seen."""
    kind: Any = transformers.CONFIG_MAPPING[name]
    default = kind()
    chosen = {key: value for key, value in (SETTINGS | variant).items() if value is not None}
    config = kind(**{key: value for key, value in chosen.items() if getattr(default, key, None) is not None})
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(tensor.numel() for tensor in auto.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size / 1e6:,.0f} million parameters")
    torch.manual_seed(0)
    model: Any = auto.from_config(config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.normal_(0, 0.2)
    return model.eval()


def plain(name: str, folder: str, ids: torch.Tensor) -> torch.Tensor | str:
    """Logits of a model that was saved to `folder` and loaded again by `transformers`, or why there are none."""
    reason = ""
    for variant in VARIANTS:
        try:
            small_model(name, variant).save_pretrained(folder)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.inference_mode():
                logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
            return logits
        except Exception as error:  # noqa: BLE001 - any model code may fail in any way over settings not made for it
            reason = reason or " ".join(f"{type(error).__name__}: {error}".split())[:100]
    return reason


def compare(name: str) -> str:
    """`equal`, or what is different, or `skipped: reason`."""
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        wanted = plain(name, folder, ids)
        if isinstance(wanted, str):
            return f"skipped: {wanted}"
        blueprint = open_blueprint(open_checkpoint(folder), torch.float32)
        for way in ("resident", "streamed"):
            try:
                with torch.inference_mode():
                    found = getattr(blueprint, way)()(input_ids=ids, use_cache=False).logits
            except (LowbitError, RuntimeError) as error:
                return f"{way}: {type(error).__name__}: {error}"
            if not torch.equal(found, wanted):
                return f"{way}: logits differ by up to {float((found - wanted).abs().max()):.3g}"
    return "equal"


def save_words(folder: Path) -> str:
    """A tokenizer of words beside a model, and a text of 400 of these at random."""
    tokenizer = Tokenizer(WordLevel({f"w{n}": n for n in range(256)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(folder)
    words = torch.randint(3, 250, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "words.txt").write_text(" ".join(f"w{n}" for n in words))
    return str(folder / "words.txt")


def carry(name: str, method: str) -> str:
    """Quantize a model and run it: how many weights are, and what changed; or `refused: reason`, `skipped: reason`."""
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        wanted, out = plain(name, folder, ids), f"{folder}/out"
        if isinstance(wanted, str):
            return f"skipped: {wanted}"
        words: dict[str, Any] = {"calibration": save_words(Path(folder)), "samples": 8, "sequence_length": 32}
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                lowbit.quantize(folder, out, scheme="int8-g16", method=method, **words)
            models = [lowbit.load(out, reference=True), lowbit.load(out, exact=True)]
            with torch.inference_mode():
                slow, fast = (model(input_ids=ids, use_cache=False).logits for model in models)
        except LowbitError as error:
            return f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - what fails here is what this script is for
            return f"failed: {type(error).__name__}: {error}"
        count = sum(weight.scheme is not None for weight in lowbit.open_checkpoint(out).weights.values())
    change, kernels = float((slow - wanted).norm() / wanted.norm()), float((fast - slow).norm() / slow.norm())
    return f"{count} weights, logits changed by {change:.3f}, kernels by {kernels:.1e}"


def main() -> None:
    """Compare all, print a line for each type, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--quantize", metavar="METHOD")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in transformers.CONFIG_MAPPING]
    results, work = {}, partial(carry, method=options.quantize) if options.quantize else compare
    for name in options.only or known:
        with contextlib.redirect_stdout(None):
            results[name] = work(name)
        if not options.json:
            print(f"{name:>28}: {results[name]}", flush=True)
    skipped = sum(result.startswith("skipped") for result in results.values())
    good = sum(result == "equal" or " weights, " in result for result in results.values())
    word = "quantized" if options.quantize else "equal"
    summary = {"transformers": transformers.__version__, word: good, "compared": len(results) - skipped}
    print(json.dumps(summary | {"results": results}, indent=2) if options.json else summary)


if __name__ == "__main__":
    main()
