"""The chance of each split of 20 changed items, if both models were equally good."""

from __future__ import annotations

from scipy.special import bdtr

from quantgate.statistics import noninferiority

from .shapes import heading, line, rect, svg, text


def draw() -> str:
    lost, won = 14, 6
    changed = lost + won
    p_value = noninferiority.mcnemar_p_value(lost, won)
    title = "McNemar's p-value, beside the verdict"
    caption = (
        f"{changed} items changed: {lost} lost, {won} won. Were both models equally good, {lost} "
        f"or more would be lost in {p_value:.1%} of cases."
    )
    chances = [
        float(bdtr(k, changed, 0.5) - (bdtr(k - 1, changed, 0.5) if k else 0.0))
        for k in range(changed + 1)
    ]
    left, right, top, bottom = 60, 700, 84, 250
    step = (right - left) / len(chances)
    shapes = [*heading(title, caption)]
    for k, chance in enumerate(chances):
        height = (bottom - top) * chance / max(chances)
        kind = "FAIL" if k >= lost else "dot"
        shapes.append(rect(left + step * k + 3, bottom - height, step - 6, height, kind))
        if k % 2 == 0:
            shapes.append(text(left + step * (k + 0.5), bottom + 18, f"{k}", "soft small middle"))
    shapes.append(line(left, bottom, right, bottom, "line"))
    shapes.append(
        text((left + right) / 2, bottom + 36, "items lost, of 20 that changed", "soft small middle")
    )
    shapes.append(text(left + step * (lost + 2), bottom - 70, f"p = {p_value:.3f}", "FAIL head"))
    return svg(title, caption, shapes, height=bottom + 54)
