"""Shows an evaluation: a table for people, an SVG of cost against quality."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

Curve = list[tuple[float, float]]
COLOURS = ("#1d4ed8", "#b45309", "#6b7280", "#047857", "#9d174d")


def show(results: dict[str, Any], console: Console) -> None:
    """Print one table of the routing figures (means over seeds, sd in brackets) and their baselines."""
    pair = Table(title="two models: share of the gap recovered (APGR; random .500)", title_justify="left")
    for heading in (
        "data",
        "protocol",
        "apgr",
        "cpt50",
        "cpt80",
        "auroc",
        "ece",
        "random",
        "prior only",
        "oracle",
    ):
        pair.add_column(heading)
    for data in ("mmlu", "gsm8k", "mt_bench"):
        for protocol, row in results[data].items():
            cells = [f"{row['apgr']:.3f} ({row['sd']['apgr']:.3f})"]
            cells += [
                _number(row[key])
                for key in ("cpt50", "cpt80", "auroc", "ece", "random", "prior_only", "oracle")
            ]
            pair.add_row(data, protocol.replace("_", " "), *cells)
    console.print(pair)
    many = Table(title="nine models: area under the cost-quality hull (AIQ)", title_justify="left")
    for heading in ("protocol", "aiq", "zero router", "best single", "random", "prior only", "oracle", "ece"):
        many.add_column(heading)
    for protocol, row in results["llmrouter"].items():
        cells = [f"{row['aiq']:.3f} ({row['sd']['aiq']:.3f})"]
        keys = ("zero_router", "best_single", "random", "prior_only", "oracle", "ece")
        many.add_row(protocol.replace("_", " "), *cells, *(_number(row[key]) for key in keys))
    console.print(many)


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def plot(panels: dict[str, dict[str, Curve]]) -> str:
    """Return an SVG with one panel per protocol; every curve is a list of (cost or share, quality) points."""
    width, height, margin, columns = 380, 280, 46, 2
    rows = (len(panels) + columns - 1) // columns
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * width}" height="{rows * height}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, (title, curves) in enumerate(panels.items()):
        left, top = number % columns * width, number // columns * height
        points = [point for curve in curves.values() for point in curve]
        x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
        y0, y1 = min(y for _, y in points), max(y for _, y in points)
        inner_x, inner_y = width - 2 * margin, height - 2 * margin

        def place(
            x: float,
            y: float,
            box: tuple[float, float, float, float] = (x0, x1, y0, y1),
            corner: tuple[int, int] = (left, top),
            inner: tuple[int, int] = (inner_x, inner_y),
        ) -> str:
            across = (x - box[0]) / (box[1] - box[0] or 1.0) * inner[0]
            down = inner[1] - (y - box[2]) / (box[3] - box[2] or 1.0) * inner[1]
            return f"{corner[0] + margin + across:.1f},{corner[1] + margin + down:.1f}"

        parts.append(f'<text x="{left + margin}" y="{top + 20}" font-size="13">{escape(title)}</text>')
        parts.append(
            f'<rect x="{left + margin}" y="{top + margin}" width="{inner_x}" height="{inner_y}" fill="none" '
            'stroke="#d1d5db"/>'
        )
        bottom = top + height - margin + 14
        for text, x, y, anchor in (
            (f"{x0:.3g}", left + margin, bottom, "start"),
            (f"{x1:.3g}", left + width - margin, bottom, "end"),
            (f"{y0:.3f}", left + margin - 4, top + height - margin, "end"),
            (f"{y1:.3f}", left + margin - 4, top + margin + 8, "end"),
        ):
            parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>')
        for index, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[index % len(COLOURS)]
            line = " ".join(place(x, y) for x, y in sorted(curve))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            y = top + height - margin - 6 - 13 * (len(curves) - 1 - index)
            parts.append(
                f'<text x="{left + width - margin - 4}" y="{y}" text-anchor="end" fill="{colour}">'
                f"{escape(name)}</text>"
            )
    return "".join(parts) + "</svg>\n"
