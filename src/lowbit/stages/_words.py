"""How the report writes numbers and names."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from math import expm1, floor, inf, isfinite, log10

from markupsafe import Markup, escape

from lowbit.stages._quality import Interval

MINUS = "\N{MINUS SIGN}"


def short(value: float) -> str:
    """Three significant digits, and no exponent for numbers that people meet: `0.0000787`, `91.0`, `1,204`."""
    if not isfinite(value):
        return "not a number"
    size = abs(value)
    digits = 2 - floor(log10(size)) if size > 0 else 0
    text = f"{value:,.{max(digits, 0)}f}" if digits <= 9 and size < 1e7 else f"{value:.2e}"
    return text.replace("-", MINUS)


def counted(number: int, noun: str) -> str:
    """How many: `1 window`, `1,204 windows`."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def percent(share: float, sign: bool = False) -> str:
    """A share in percent, to about three digits: `87.7%`, `99.26%`, `+0.65%`, `0.0031%`."""
    if not isfinite(share):
        return "not a number"
    value = 100 * share
    size = abs(value)
    near = 99 <= size < 100
    text = f"{value:,.2f}" if near or 0.1 <= size < 10 else f"{value:,.1f}" if size >= 10 else f"{value:#.2g}"
    return f"{'+' if sign and value > 0 else ''}{text.replace('-', MINUS)}%"


def bits(value: float) -> str:
    """Bits per weight: `4.125`, `4.5`, `16`."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def growth(change: float) -> str:
    """A change of the log-perplexity as growth of the perplexity: `+0.65%`."""
    return percent(expm1(change) if change < 50 else inf, sign=True)


def limits(interval: Interval, write: Callable[[float], str] = short) -> str:
    """`0.0233 to 0.0256`, or nothing without an interval."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{write(interval.low)} to {write(interval.high)}"


def span(interval: Interval, write: Callable[[float], str] = short) -> str:
    """` (95% interval 0.0233 to 0.0256)`, or nothing without an interval."""
    between = limits(interval, write)
    return f" (95% interval {between})" if between else ""


def duration(seconds: float) -> str:
    """`0.31 s`, `21 s`, `4 min 07 s`, `2 h 05 min`."""
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def moment(text: str) -> str:
    """An ISO 8601 time for readers: `21 November 2026, 14:40 UTC`."""
    return datetime.fromisoformat(text).strftime("%d %B %Y, %H:%M %Z").lstrip("0")


def shorten(text: str, limit: int) -> str:
    """The text, its middle left out where it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[len(text) - limit // 2 + 1 :]}"


def breakable(text: str, limit: int = 160) -> Markup:
    """Escaped text of bounded length that may break after the dots and slashes of a long name."""
    return Markup(re.sub(r"([./])(?=[^\W\d])", r"\1<wbr>", str(escape(shorten(text, limit)))))


def cell(text: object) -> str:
    """Text that stays in its cell of a Markdown table and starts no markup."""
    flat = " ".join(str(text).split())
    # Between letters or digits an underscore is none of emphasis, and escaped it would be in the way of who copies it.
    return re.sub(r"([\\|`*\[\]<>]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", flat)


def code(text: str) -> str:
    """Text as Markdown code, also inside a table."""
    flat = " ".join(text.replace("`", "\N{MODIFIER LETTER GRAVE ACCENT}").split())
    return "`" + flat.replace("|", "\\|") + "`"
