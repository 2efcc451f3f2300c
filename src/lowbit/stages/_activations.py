"""Inputs of weights rounded as a runtime rounds them: what a model computes when its activations are quantized too.

A scheme of activations is read with the tokens as rows: `int8-row` is one scale per token, `fp8-e4m3-g128` one per 128
values of a token, both made when the model runs. Where all tokens share a scale (`-tensor`, the global scale of NVFP4)
it comes from calibration and is stored with the weight (`Weight.input_scale`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowbit import native
from lowbit.errors import UnsupportedError
from lowbit.formats import Weight
from lowbit.formats._checks import row_chunks
from lowbit.methods._scales import Affine, encode, fit, global_divisor, shares_rows
from lowbit.schemes import Scheme
from lowbit.stages._policy import expert_of
from lowbit.stages._products import Product, Products, Region
from lowbit.tensors import block_size, level_table

Kind = tuple[Scheme | None, float | None]  # how inputs are rounded, and the scale that is stored for it


def input_scale(largest: float, scheme: Scheme) -> float | None:
    """What to store with a weight whose inputs are at most `largest` in magnitude; None where nothing is stored.

    For one scale of all tokens that scale, exact in the scheme's type; for NVFP4 the number by which the scales of
    groups are multiplied before they are rounded.
    """
    ends = (torch.tensor([[-largest]]), torch.tensor([[largest]]))
    if scheme.nested:
        return global_divisor(ends, {}, scheme)
    return fit(ends, scheme).scales.item() if shares_rows(scheme) else None


def rounded(
    x: Float[Tensor, "*tokens cols"],
    scheme: Scheme,
    scale: float | None = None,
    factors: Float[Tensor, "cols"] | None = None,
) -> Float[Tensor, "*tokens cols"]:
    """The inputs on the grid of the scheme, in float32 and rounded once to the dtype of `x`; gradients pass unchanged.

    Args:
        x: inputs of one weight.
        scheme: grid and blocks; see the module.
        scale: what `input_scale` gave. None where the scheme stores none; else it is found from `x`.
        factors: divide the inputs before and multiply them after.

    NaN and infinities stay in the output, as NaN in all of it.
    """
    values = x.detach().reshape(-1, x.shape[-1])
    out = torch.empty_like(values)
    if scale is None and values.numel():
        wide = values if factors is None else values / factors
        scale = input_scale(wide.abs().amax().float().item(), scheme) if shares_rows(scheme) or scheme.nested else None
    for rows in row_chunks(*values.shape):
        part = values[rows].float() if factors is None else values[rows] / factors
        found = _round_rows(part.contiguous(), scheme, scale)
        out[rows] = found if factors is None else found * factors
    result = out.view(x.shape)
    if factors is not None and factors.requires_grad:
        return x + (result - x).detach() + _pulled(values, (out - values).detach(), scheme, factors).view(x.shape)
    return x + (result - x).detach() if x.requires_grad else result


def _pulled(x: Tensor, error: Tensor, scheme: Scheme, factors: Tensor) -> Tensor:
    """Nothing, with the derivatives by the factors of `s round(x / s)`, the rounding's own taken for 1.

    An input moves by its error with its own factor, and by as much against that of the input that sets its scale.
    """
    high, wide = block_size((x.shape[0], x.shape[1]), scheme.block)
    move = factors.log() - factors.log().detach()
    if high != 1 or x.shape[1] % wide:
        return (error * move).to(x.dtype)
    top = (x / factors.detach()).abs().view(len(x), -1, wide).argmax(-1)
    top += torch.arange(0, x.shape[1], wide)
    return (error * (move - move[top].repeat_interleave(wide, 1))).to(x.dtype)


def _round_rows(x: Float[Tensor, "rows cols"], scheme: Scheme, scale: float | None) -> Float[Tensor, "rows cols"]:
    block = block_size((x.shape[0], x.shape[1]), scheme.block)
    low, high, bad = native.block_range(x, *block)
    if bad >= 0:
        return torch.full_like(x, torch.nan)
    if shares_rows(scheme) and scale is not None:
        affine = Affine(torch.full((1, 1), scale), None)
    else:
        affine = fit((low, high), scheme, 1.0 if scale is None else scale)
    codes = encode(x, affine, scheme, block)
    return native.dequantize(codes, affine.scales * affine.unit, affine.zeros, level_table(scheme.grid), *block)


def round_inputs(
    model: nn.Module,
    weights: Mapping[str, Weight],
    sources: Mapping[str, frozenset[str]],
    terms: Mapping[str, tuple[Tensor, Tensor]],
    factors: Callable[[str], Tensor | None] = lambda name: None,
) -> None:
    """Let a model round the inputs of every module whose weight says so.

    Args:
        model: its modules' `forward` takes the inputs first.
        weights: those of the checkpoint, by name.
        sources: for each parameter of the model, the weights of the checkpoint that it is made of.
        terms: low-rank pairs `(down, up)` beside weights; they read the inputs before these are rounded.
        factors: by name of a weight what a runtime multiplies its inputs by before it rounds them; None for nothing.

    Raises:
        UnsupportedError: a parameter is made of weights whose inputs are not rounded alike, or is neither a matrix nor
            a stack of experts; or of several weights of which one has a low-rank term, or factors.
    """
    stacks: dict[str, dict[str, list[Kind]]] = {}
    for parameter, names in sources.items():
        kinds = {(weights[name].activations, weights[name].input_scale) for name in names}
        (scheme, scale), *others = sorted(kinds, key=str) if kinds else [(None, None)]
        if scheme is None and not others:
            continue
        pairs = [terms[name] for name in names if name in terms]
        own = pairs or any((weights[name].scheme or scheme).smooth for name in names if scheme)
        whole = model.get_parameter(parameter)
        stack = _of_experts(names, weights, len(whole)) if whole.dim() == 3 and not own else None
        if stack:
            path, _, leaf = parameter.rpartition(".")
            stacks.setdefault(path, {})[leaf] = stack
            continue
        single = whole.dim() == 2 and (len(names) == 1 or not own)
        if others or scheme is None or not single:
            raise UnsupportedError(
                f"{parameter} is made of weights that read several inputs, which are quantized when the model runs: "
                "that cannot be evaluated; quantize weights alone"
            )
        module = model.get_submodule(parameter.rpartition(".")[0])
        for pair in pairs:
            _add_branch(module, *pair)
        smoothing = [1 / found for name in names if (found := factors(name)) is not None]
        module.register_forward_pre_hook(_hook(scheme, scale, *smoothing))
    choose: Callable[[str], None] | None = getattr(model, "set_experts_implementation", None)
    if stacks and choose:
        choose("eager")  # a product for each expert, as calibration has them
    for path, each in stacks.items():
        _round_experts(model, path, each)


def _of_experts(names: Iterable[str], weights: Mapping[str, Weight], count: int) -> list[Kind] | None:
    """How each expert's inputs are rounded; None where that is not one way for all weights of an expert."""
    kinds: dict[int, set[Kind]] = {}
    for name in names:
        place = expert_of(name)
        kinds.setdefault(place[1] if place else -1, set()).add((weights[name].activations, weights[name].input_scale))
    if kinds.keys() != set(range(count)) or any(len(each) > 1 for each in kinds.values()):
        return None
    return [next(iter(kinds[expert])) for expert in range(count)]


def _round_experts(model: nn.Module, path: str, stacks: Mapping[str, Sequence[Kind]]) -> None:
    """Let a module of stacks, by parameter, round what each expert reads: its own input is that of all of them."""
    kinds = {f"{own}.{at}": kind for own, each in stacks.items() for at, kind in enumerate(each)}
    watching: list[ExitStack] = []

    def before(product: Product) -> Tensor | None:
        scheme, scale = kinds[product.names[0]]
        return rounded(product.rows, scheme, scale) if scheme else None

    def begin(module: nn.Module, inputs: object) -> None:
        held = {own: module.get_parameter(own).detach() for own in stacks}  # others each time where a model is streamed
        regions = [Region(f"{own}.{at}", matrix) for own in held for at, matrix in enumerate(held[own])]
        watching.append(ExitStack())
        watching[-1].enter_context(Products(regions, before))

    module = model.get_submodule(path)
    module.register_forward_pre_hook(begin)
    module.register_forward_hook(lambda *_: watching.pop().close(), always_call=True)


def _hook(
    scheme: Scheme, scale: float | None, factors: Tensor | None = None
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, inputs: (rounded(inputs[0], scheme, scale, factors), *inputs[1:])


def _add_branch(module: nn.Module, down: Tensor, up: Tensor) -> None:
    """Let a module add `up @ down` times its inputs, as they are when its hooks begin."""
    thin: list[Tensor] = []

    def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        thin.append(inputs[0] @ down.T.to(inputs[0].dtype))

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        found = thin.pop()
        return output + found @ up.T.to(found.dtype)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(add)
