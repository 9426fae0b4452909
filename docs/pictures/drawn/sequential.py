"""The interval while items are asked: sequential bounds beside fixed ones."""

from __future__ import annotations

from quantgate.statistics import noninferiority, sequential

from .shapes import heading, line, path, rect, svg, text


def draw() -> str:
    title = "non_inferiority, sequential: looked at while items are asked"
    caption = (
        "Dashed: holds at one size, chosen before. Green: at every size. "
        "At a dot the margin is excluded."
    )
    margin, low, high = 2.0, -6.0, 4.0
    sizes = [*range(60, 400, 20), *range(400, 3001, 40)]
    left, right, top, bottom = 70, 590, 76, 300

    def x(n: float) -> float:
        return left + (right - left) * n / sizes[-1]

    def y(points: float) -> float:
        return bottom - (bottom - top) * (points - low) / (high - low)

    shapes = [*heading(title, caption)]
    shapes.append(rect(left, y(-margin), right - left, bottom - y(-margin), "bad"))
    for tick in (-6, -4, -2, 0, 2, 4):
        name = f"{tick:+d} pt".replace("-", "−") if tick else "0"
        shapes.append(text(left - 8, y(tick) + 4, name, "soft small end"))
    for n in range(500, sizes[-1] + 1, 500):
        shapes.append(text(x(n), bottom + 18, f"{n:,}", "soft small middle"))
    shapes.append(text((left + right) / 2, bottom + 36, "items asked so far", "soft small middle"))
    shapes.append(line(left, y(0), right, y(0), "line", dash="2 4"))
    shapes.append(line(left, y(-margin), right, y(-margin), "limit", width=2))
    shapes.append(text(right - 8, y(-margin) + 16, "margin −2 pt", "ink small end"))
    for test, name, kind, dash in (
        (noninferiority, "fixed n", "soft", "5 4"),
        (sequential, "sequential", "PASS", ""),
    ):
        found = [test.difference_interval(0.010 * n, 0.009 * n, n, confidence=0.95) for n in sizes]
        for bounds in ([one.lower for one in found], [one.upper for one in found]):
            points = [
                (x(n), y(100 * bound))
                for n, bound in zip(sizes, bounds, strict=True)
                if low <= 100 * bound <= high
            ]
            shapes.append(path(points, "line" if kind == "soft" else kind, dash=dash))
        first = next(n for n, one in zip(sizes, found, strict=True) if 100 * one.lower > -margin)
        shapes.append(f'<circle class="{kind}" cx="{x(first):.1f}" cy="{y(-margin):.1f}" r="4.5"/>')
        label = y(100 * found[-1].upper) + (8 if kind == "soft" else 0)
        shapes.append(text(right + 10, label, f"{name}: {first:,} items", f"{kind} small"))
    return svg(title, caption, shapes, height=bottom + 54)
