"""SVG: shapes as text, and the card they stand on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

WIDTH = 760

# Colours of their own on a card of its own, so that a page's theme does not matter.
STYLE = """
.card{fill:#fff;stroke:#d0d7de}.ink{fill:#1f2328}.soft{fill:#59636e}.line{stroke:#59636e}
.limit{stroke:#1f2328}.bad{fill:#cf222e;opacity:.08}.dot{fill:#59636e;opacity:.45}
.PASS{stroke:#1a7f37;fill:#1a7f37}.FAIL{stroke:#cf222e;fill:#cf222e}
.INCONCLUSIVE{stroke:#9a6700;fill:#9a6700}
text{stroke:none!important;font:13px system-ui,sans-serif}.small{font-size:11.5px}
.head{font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}
@media(prefers-color-scheme:dark){.card{fill:#151b23;stroke:#3d444d}.ink{fill:#f0f6fc}
.soft{fill:#9198a1}.line{stroke:#9198a1}.limit{stroke:#f0f6fc}.bad{fill:#f85149;opacity:.16}
.dot{fill:#9198a1}.PASS{stroke:#3fb950;fill:#3fb950}.FAIL{stroke:#f85149;fill:#f85149}
.INCONCLUSIVE{stroke:#d29922;fill:#d29922}}
""".replace("\n", "")


def svg(title: str, caption: str, shapes: Iterable[str], *, height: float) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'width="{WIDTH}" height="{height:.0f}" role="img">',
            f"<title>{escape(title)}</title><desc>{escape(caption)}</desc>",
            f"<style>{STYLE}</style>",
            rect(0.5, 0.5, WIDTH - 1, height - 1, "card", radius=8),
            *shapes,
            "</svg>\n",
        ]
    )


def heading(title: str, caption: str) -> list[str]:
    return [text(20, 28, title, "ink head"), text(20, 48, caption, "soft small")]


def text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, *, radius: int = 0) -> str:
    rounded = f' rx="{radius}"' if radius else ""
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"{rounded}/>'
    )


def line(
    x1: float, y1: float, x2: float, y2: float, kind: str, *, width: float = 1, dash: str = ""
) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def path(points: Sequence[tuple[float, float]], kind: str, *, dash: str) -> str:
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline class="{kind}" points="{steps}" style="fill:none" stroke-width="2"{dashed}/>'
