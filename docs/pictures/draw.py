"""Draws the pictures of docs/quality.md: `python docs/pictures/draw.py`.

Every interval, outcome and required n in them is the answer of the functions that judge a release,
to the measurements written down in `drawn`. tests/test_pictures.py holds the files to this script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from drawn import limit, mcnemar, mean, non_inferiority, percentile, rate, ratio, sequential

PICTURES: Mapping[str, Callable[[], str]] = {
    "non-inferiority.svg": non_inferiority.draw,
    "sequential.svg": sequential.draw,
    "mean.svg": mean.draw,
    "rate.svg": rate.draw,
    "percentile.svg": percentile.draw,
    "ratio.svg": ratio.draw,
    "limit.svg": limit.draw,
    "mcnemar.svg": mcnemar.draw,
}


def main() -> None:
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
