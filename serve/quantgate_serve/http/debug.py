"""`/debug/requests`: the recent requests' lives, as JSON or as a page. Loopback clients only."""

from dataclasses import asdict, fields
from html import escape
from ipaddress import ip_address

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from quantgate_serve.http.errors import ApiError
from quantgate_serve.lives import Life

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
# How a life ended is looked for first; the error, which may be long, stands last.
_LAST = ("error",)
_FIRST = ("id", "arrived", "finish_reason")
_NAMES = tuple(item.name for item in fields(Life))
_COLUMNS = (*_FIRST, *(name for name in _NAMES if name not in (*_FIRST, *_LAST)), *_LAST)
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; }
table { border-collapse: collapse; }
th, td { padding: 2px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #fff; white-space: normal; vertical-align: bottom; }
td:last-child { text-align: left; } .failed { color: #c00; }
p i { font-style: normal; padding: 0 6px; }
.bar { width: 240px; text-align: left; }
.bar i { display: inline-block; height: 10px; }
.before { background: #bbb; } .queue { background: #e6a23c; }
.prefill { background: #409eff; } .decode { background: #67c23a; }
"""


def check_loopback(http: HttpRequest) -> None:
    """Refuse whoever is not on this machine, also behind a proxy that is.

    Raises:
        ApiError: 403.
    """
    host = "" if http.client is None else http.client.host
    try:
        is_near = ip_address(host).is_loopback
    except ValueError:
        is_near = False
    if not is_near or any(name in http.headers for name in _FORWARDED):
        raise ApiError(
            403,
            "/debug/requests is answered on this machine only. Ask 127.0.0.1 from its shell.",
            code="loopback_only",
        )


def lives_answer(http: HttpRequest, lives: list[Life], *, model_name: str) -> Response:
    """A page for who asks for HTML, as browsers do, else JSON."""
    if "text/html" in http.headers.get("accept", ""):
        return HTMLResponse(_page(lives, model_name))
    return JSONResponse({"model": model_name, "requests": [asdict(life) for life in lives]})


def _page(lives: list[Life], model_name: str) -> str:
    longest = max((life.end_ms for life in lives), default=0.0) or 1.0
    head = "".join(f"<th>{_heading(name)}</th>" for name in _COLUMNS)
    rows = "\n".join(_line(life, longest) for life in lives)
    title = f"{escape(model_name)}: {len(lives)} recent requests"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        "<p>Milliseconds after arrival; the newest first, after those in flight. "
        "<i class=before>before the queue</i> <i class=queue>queue</i> "
        "<i class=prefill>prefill</i> <i class=decode>decode</i></p>"
        f"<table><tr><th class=bar>life</th>{head}</tr>\n{rows}\n</table></html>"
    )


def _heading(name: str) -> str:
    return escape(name.removesuffix("_ms").replace("_", " "))


def _line(life: Life, longest: float) -> str:
    cells = "".join(f"<td>{_cell(name, getattr(life, name))}</td>" for name in _COLUMNS)
    kind = "" if life.error is None else " class=failed"
    return f"<tr{kind}><td class=bar>{_bar(life, longest)}</td>{cells}</tr>"


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if name == "arrived":  # the date is the same for all but those around midnight
        text = escape(str(value))
        return f'<span title="{text}">{text.partition("T")[2].partition("+")[0] or text}</span>'
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))


def _bar(life: Life, longest: float) -> str:
    """The parts of a life, each as long as it took; a part ends where the next begins."""
    parts, begun = [], 0.0
    for name, end in (
        ("before", life.queued_ms),
        ("queue", life.admitted_ms),
        ("prefill", life.first_token_ms),
        ("decode", life.finished_ms or life.last_token_ms),
    ):
        if end is not None and end > begun:
            width = 240 * (end - begun) / longest
            parts.append(f'<i class={name} title={name} style="width:{width:.1f}px"></i>')
            begun = end
    return "".join(parts)
