"""Write Markdown for reports: tables, figures in percent, and texts of unknown content."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

UNDEFINED = "-"
"""Cell of an undefined figure."""

_NUMBER = re.compile(r"[\d.]+( ± [\d.]+)?|-|")


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Writes a Markdown table with columns that line up in the text, numbers to the right.

    Args:
        rows: cells, Markdown on one line each; texts of unknown content go through `plain` first.
        header: one cell for each column.

    Raises:
        ValueError: if a row has another number of cells than the header.
    """
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    for line in lines[1:]:
        if len(line) != len(header):
            raise ValueError(f"`rows` must have {len(header)} cells each, as `header` has, but {line} was given.")
    columns = list(zip(*lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    numbers = [len(rows) > 0 and all(_NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    rule = [f"{'-' * (width - 1)}:" if number else "-" * width for width, number in zip(widths, numbers, strict=True)]
    layouts = [f"{'>' if number else '<'}{width}" for width, number in zip(widths, numbers, strict=True)]
    padded = [[format(*cell) for cell in zip(line, layouts, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def percent(stat: Mapping | None) -> str:
    """Writes a figure in percent with one decimal, such as "93.6 ± 0.4".

    Args:
        stat: `mean` and `std` in [0, 1], and `values`, one for each seed; None or nan where undefined.

    Returns:
        Without a spread for a single seed, and "-" where undefined.
    """
    if stat is None or not is_defined(stat.get("mean")):
        return UNDEFINED
    if not is_defined(stat.get("std")) or sum(map(is_defined, stat.get("values") or ())) < 2:
        return f"{100 * stat['mean']:.1f}"
    return f"{100 * stat['mean']:.1f} ± {100 * stat['std']:.1f}"


def plain(text: object) -> str:
    """Escapes a text, such as a folder's name, so that Markdown and HTML show it as it is, on one line."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    # An underscore within a word means nothing to Markdown, and is easier to read as it is.
    return re.sub(r"[\\`*{}\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def is_defined(value: float | None) -> bool:
    """Tells whether a figure is a finite number."""
    return value is not None and math.isfinite(value)
