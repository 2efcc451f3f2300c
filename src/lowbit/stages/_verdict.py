"""The verdict: what a run's numbers mean, in words. The rules are explained in `docs/report.md`.

Quality is judged by one number only, the mean KL divergence from the original, at the worse end of its 95% interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Literal, final

from lowbit.budget import format_size
from lowbit.stages._quality import Interval, Quality, read_quality
from lowbit.stages._recipe import ROTATE
from lowbit.stages._records import RunRecord
from lowbit.stages._words import bits, counted, duration, growth, limits, percent, short, span

Tone = Literal["good", "fair", "poor", "bad", "unknown"]


@final
@dataclass(frozen=True)
class Band:
    """A range of mean KL divergence, in nats per token, up to `top`.

    `like` names published results of that size, which are the reason for the border: llama.cpp's scoreboard of
    Llama-3-8B on WikiText-2 (tools/perplexity/README.md).
    """

    name: str
    top: float
    headline: str
    tone: Tone
    like: str


BANDS = (
    Band("very close", 0.01, "Very close to the original", "good", "8 and 6 bits: q8_0 0.001, q6_K 0.005"),
    Band("close", 0.05, "Close to the original", "good", "4 to 5 bits: q5_K_M 0.011, q4_K_M 0.03, q4_K_S 0.04"),
    Band("changed", 0.15, "Noticeably changed", "fair", "plain 4 bits, good 3 bits: q4_0 0.07, q3_K_M 0.10"),
    Band("far", 0.5, "Far from the original", "poor", "2 to 3 bits: q3_K_S 0.20, q2_K 0.33 to 0.45"),
    Band("broken", inf, "Broken: do not use this result", "bad", "below 2.5 bits: iq2_XS 0.55, iq1_S 2.2"),
)
_FLOOR = 0.001  # where the drawn scale begins


@final
@dataclass(frozen=True)
class Verdict:
    """The headline, how good it is, and the sentences under it."""

    headline: str
    tone: Tone
    sentences: tuple[str, ...]


def band(divergence: float) -> int:
    """Index in `BANDS` of a mean KL divergence; what is not a number is broken."""
    return next((at for at, each in enumerate(BANDS) if divergence < each.top), len(BANDS) - 1)


def position(divergence: float) -> float:
    """Where a divergence stands on a scale that gives every band the same width, 0 to 1; logarithmic inside a band."""
    at = band(divergence)
    low = BANDS[at - 1].top if at else _FLOOR
    high = BANDS[at].top if isfinite(BANDS[at].top) else 10 * low
    value = min(max(divergence, low), high) if isfinite(divergence) else high
    return (at + log(value / low) / log(high / low)) / len(BANDS)


def judge(run: RunRecord) -> Verdict:
    """The verdict on a run: what is wrong with it first, then its quality, then its size."""
    quality = read_quality(run.evaluation)
    headline, tone = _headline(run, quality)
    return Verdict(headline, tone, tuple(_sentences(run, quality)))


def _headline(run: RunRecord, quality: Quality | None) -> tuple[str, Tone]:
    checked = run.verified
    smaller = f"{run.source.bytes / max(run.result.bytes, 1):.2f} times smaller"
    if checked and checked.mismatches:
        return f"Not what was meant: {checked.mismatches:,} of {checked.tensors:,} tensors differ. Do not use it", "bad"
    if not any(row.scheme for row in run.rows):
        return "Nothing was quantized", "unknown"
    if quality and not quality.finite:
        return BANDS[-1].headline, "bad"
    if not quality or not quality.divergence:
        return f"{smaller.capitalize()}; quality was not {'compared' if quality else 'measured'}", "unknown"
    found = BANDS[band(quality.divergence.worst)]
    return (found.headline if found.tone == "bad" else f"{found.headline}, {smaller}"), found.tone


def _sentences(run: RunRecord, quality: Quality | None) -> Iterator[str]:
    yield _size_sentence(run)
    yield from _quality_sentences(run, quality)
    if run.recipe.split("+")[0] == ROTATE:
        yield f"The model was rotated before ({run.recipe}): with its weights as they were it computes the same."
    yield from _calibration_sentences(run)
    yield from (f"{warning[:1].upper()}{warning[1:]}." for warning in run.warnings)
    yield _check_sentence(run)
    peak, limit = run.memory.peak, run.memory.limit
    if limit is not None and peak > limit:
        yield f"Memory went over its limit: {format_size(peak)}, where {format_size(limit)} were allowed."


def _calibration_sentences(run: RunRecord) -> Iterator[str]:
    """Text that was learned from, and what it changed."""
    facts = run.calibration
    if facts and not any(row.scheme for row in run.rows):
        yield f"Method {facts['recipe']} learned nothing from the calibration text, for there was nothing to quantize."
    elif facts:
        names = ", ".join(source["name"] for source in facts["sources"])
        yield (
            f"Method {facts['recipe']} learned from {counted(facts['samples'], 'window')} of "
            f"{counted(facts['length'], 'token')} of "
            f"{names} (tokens {facts['sha256'][:12]}), computed in {facts['dtype']}."
        )
        if facts.get("folded"):
            tensors = counted(facts["folded"], "tensor")
            yield f"{tensors} {_were(facts['folded'])} rescaled before, so that the model computes the same."
        yield from _tuning_sentences(facts.get("tuned"))


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _tuning_sentences(tuned: Mapping[str, float] | None) -> Iterator[str]:
    """What moving scales and norms brought on windows that it did not see."""
    if tuned and tuned["after"] < tuned["before"]:
        yield (
            "Scales and norms were tuned end to end: the loss on held-out windows fell from "
            f"{short(tuned['before'])} to {short(tuned['after'])} nats per token."
        )
        if tuned["fixed"]:
            yield f"{tuned['fixed']:,.0f} quantized tensors have no scales that can be moved."
    elif tuned and not isfinite(tuned["before"]):
        yield "Scales and norms were not tuned: the loss on held-out windows is not finite."
    elif tuned:
        yield "Tuning scales and norms end to end did not lower the loss on held-out windows, and was left out."


def _check_sentence(run: RunRecord) -> str:
    checked = run.verified
    if not checked:
        return "What was written has not been read back."
    took = f"in {duration(checked.seconds)}"
    read = f"All {checked.tensors:,} stored tensors were read back and compared with what was meant {took}"
    return f"{read}: {checked.mismatches:,} of them DIFFER." if checked.mismatches else f"{read}; all are equal."


def _size_sentence(run: RunRecord) -> str:
    source, result = run.source, run.result
    quantized = sum(1 for row in run.rows if row.scheme)
    sizes = (
        f"{format_size(source.bytes)} of {source.dtype} weights became {format_size(result.bytes)} of {result.format}"
    )
    if not quantized:
        return f"{sizes}: all {len(run.rows):,} tensors were kept as they are."
    return (
        f"{sizes}: {bits(result.bits_quantized)} bits per weight in the {quantized:,} quantized tensors, "
        f"{bits(result.bits_all)} over all {len(run.rows):,}, scales and zero points included."
    )


def _quality_sentences(run: RunRecord, quality: Quality | None) -> Iterator[str]:
    if not quality and run.unscored:
        yield f"The evaluation failed: {run.unscored}."
    elif not quality:
        yield "Nothing was evaluated: errors of single weights do not tell how well the model still works."
    if not quality:
        return
    if not quality.finite:
        yield "The evaluation gave values that are not numbers: the model's output is destroyed."
    if quality.divergence:
        yield _divergence_sentence(quality, quality.divergence)
        yield from _border_sentence(quality.divergence)
    yield _perplexity_sentence(quality)


def _divergence_sentence(quality: Quality, divergence: Interval) -> str:
    same = (
        f"; the most likely next token is the same for {percent(quality.agreement.value)}" if quality.agreement else ""
    )
    return (
        f"On {quality.tokens:,} tokens of {quality.text}, predictions differ from the original's by a mean KL "
        f"divergence of {short(divergence.value)} nats per token{span(divergence)}{same}."
    )


def _border_sentence(divergence: Interval) -> Iterator[str]:
    """Say so where the interval does not settle the band."""
    best, worst = band(divergence.value if divergence.low is None else divergence.low), band(divergence.worst)
    if divergence.high is None:
        yield "There was too little text for an interval, so the verdict rests on one number."
    elif best != worst:
        yield (
            f"The interval reaches from “{BANDS[best].name}” to “{BANDS[worst].name}”: "
            "the verdict is the worse one, and more text would settle it."
        )


def _perplexity_sentence(quality: Quality) -> str:
    found, reference, change = quality.perplexity, quality.reference, quality.change
    if reference is None:
        where = f"on {quality.tokens:,} tokens of {quality.text}"
        return f"Perplexity is {short(found.value)}{span(found)} {where}; nothing was compared with it."
    moved = f"Perplexity went from {short(reference.value)} to {short(found.value)}"
    if change is None or not isfinite(change.value):
        return f"{moved}."
    if change.low is not None and change.high is not None and change.low <= 0 <= change.high:
        return f"{moved}, which this text cannot tell from no change (95% interval {limits(change, growth)})."
    return f"{moved}, {growth(change.value)}{span(change, growth)}."
