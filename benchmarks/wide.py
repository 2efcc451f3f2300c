"""Errors of products of float weights in 16 bits, beside those of inputs rounded to float16 (llama.cpp's way).

    python benchmarks/wide.py [--model DIR --text FILE]

Root mean squares of the error over those of the products, for weights and inputs that are normal, with one input of
each 256 that is larger by so many standard deviations. With a model of floats: the divergence of its predictions on the
text from those of exact products, in nats per token, and that of inputs of linear layers rounded to float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from lowbit.runtime.linear import Linear
from lowbit.runtime.model import open_model
from lowbit.runtime.panels import pack_wide


def errors(heavy: float) -> tuple[float, float]:
    """Of 16 bits, and of inputs in float16."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(2048, 2048, generator=generator).half(), torch.randn(256, 2048, generator=generator)
    x[:, ::256] += heavy
    exact = x.double() @ weight.double().T
    ours, theirs = pack_wide(weight).matrix()(x).double(), x.half().double() @ weight.double().T
    return float((ours - exact).norm() / exact.norm()), float((theirs - exact).norm() / exact.norm())


def divergences(model: Path, text: Path) -> tuple[float, float]:
    """Of predictions, the same two."""
    exact, wide = open_model(model, exact=True), open_model(model)
    ids = exact.tokenizer(text.read_text()[:6000], return_tensors="pt").input_ids[:, :1024]

    def told(of: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = of(ids).logits[0].double().log_softmax(-1)
        return found

    want, ours = told(exact.model), told(wide.model)
    for module in exact.model.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))
    theirs = told(exact.model)
    over = [float(kl_div(got, want, reduction="batchmean", log_target=True)) for got in (ours, theirs)]
    return over[0], over[1]


def main() -> None:
    """Print a line for each kind of inputs, and one for the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    for heavy in (0.0, 8.0, 30.0, 100.0):
        ours, theirs = errors(heavy)
        print(f"one input larger by {heavy:g}: 16 bits {ours:.2e}, inputs in float16 {theirs:.2e}")
    if args.model and args.text:
        ours, theirs = divergences(args.model, args.text)
        print(f"divergence: 16 bits {ours:.2e}, inputs in float16 {theirs:.2e} nats per token")


if __name__ == "__main__":
    main()
