"""Write a Llama-shaped checkpoint of random bfloat16 weights: real shapes and names, no downloads.

    python benchmarks/synthetic.py OUT [--layers 22 --hidden 2048 --mlp 5632 --heads 32 --kv-heads 4 --vocab 32000]
    python benchmarks/synthetic.py OUT --layers 32 --hidden 4096 --mlp 11008 --kv-heads 32 --distinct 2     7 billion

The default is 1.1 billion parameters, 2.2 GB, in shards of two layers. Weights are normal with a heavy tail
(one value in a thousand ten times larger), so that quantization errors look like those of trained weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers


def weight(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """One random matrix `[rows, cols]`, bfloat16."""
    values = torch.randn(rows, cols, generator=generator) * 0.02
    tail = torch.rand(rows, cols, generator=generator) < 0.001
    return torch.where(tail, values * 10, values).bfloat16()


def groups(args: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors shard by shard."""
    generator = torch.Generator().manual_seed(0)
    hidden, mlp, keys = args.hidden, args.mlp, args.hidden // args.heads * args.kv_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    made: list[dict[str, torch.Tensor]] = []
    for first in range(0, args.layers, 2):
        shard: dict[str, torch.Tensor] = {}
        for layer in range(first, min(first + 2, args.layers)):
            prefix = f"model.layers.{layer}"
            fresh = layer < args.distinct
            own = (
                {name: weight(*shape, generator) for name, shape in shapes.items()}
                if fresh
                else made[layer % len(made)]
            )
            if fresh and args.distinct < args.layers:
                made.append(own)
            shard |= {f"{prefix}.{name}.weight": tensor for name, tensor in own.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        yield shard
    yield {
        "model.embed_tokens.weight": weight(args.vocab, hidden, generator),
        "lm_head.weight": weight(args.vocab, hidden, generator),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }


def config(args: argparse.Namespace) -> dict[str, object]:
    """config.json of the checkpoint."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.hidden,
        "intermediate_size": args.mlp, "num_hidden_layers": args.layers, "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads, "vocab_size": args.vocab, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def write(args: argparse.Namespace) -> None:
    """Write shards, index and config.json."""
    args.out.mkdir(parents=True, exist_ok=True)
    shards = (args.layers + 1) // 2 + 1
    index: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(groups(args), 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(tensors, args.out / name, {"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(document))
    (args.out / "config.json").write_text(json.dumps(config(args), indent=1))
    write_tokenizer(args.out)


def write_tokenizer(path: Path) -> None:
    """A tokenizer whose tokens are the 256 bytes, and one pair of them: llama.cpp opens none without a merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("out", type=Path)
    defaults = {"layers": 22, "hidden": 2048, "mlp": 5632, "heads": 32, "kv-heads": 4, "vocab": 32000}
    for name, value in defaults.items():
        result.add_argument(f"--{name}", type=int, default=value)
    result.add_argument("--distinct", type=int, default=1 << 30, help="layers after which they repeat; even")
    return result


if __name__ == "__main__":
    write(parser().parse_args())
