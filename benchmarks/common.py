"""What the benchmarks share: medians of paired runs, one table, one figure of bars, the machine they ran on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """One line on where the numbers are from: they mean little without it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{os.cpu_count()} CPU threads, {name}, Python {platform.python_version()}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; numbers to the right."""
    text = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(header), *(len(row[index]) for row in text)) for index, header in enumerate(headers)]
    print("  ".join(header.ljust(width) for header, width in zip(headers, widths, strict=True)).rstrip())
    for row, source in zip(text, rows, strict=True):
        cells = (
            cell.rjust(width) if isinstance(value, int | float) else cell.ljust(width)
            for cell, width, value in zip(row, widths, source, strict=True)
        )
        print("  ".join(cells).rstrip())


def bars(values: Sequence[tuple[str, float]], unit: str, width: int = 50) -> None:
    """Print one bar for each (label, value >= 0), to the scale of the largest."""
    most = max((value for _, value in values), default=0.0) or 1.0
    margin = max((len(label) for label, _ in values), default=0)
    for label, value in values:
        print(f"{label.ljust(margin)}  {'█' * max(round(width * value / most), 0):{width}}  {_cell(value)} {unit}")


def median(values: Sequence[float]) -> float:
    """The middle value; of paired measurements, what a single hiccup can't move."""
    return statistics.median(values)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
