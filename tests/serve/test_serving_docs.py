"""docs/serving.md has every metric that the server has, with its type, label and meaning."""

from pathlib import Path

from quantgate_serve.families import FAMILIES, LAYERS, PREFIX

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
HEAD = "| metric | type | label | meaning |\n|---|---|---|---|\n"


def table() -> str:
    """The table as the code gives it."""
    lines = []
    for layer, families in LAYERS.items():
        lines.append(f"| **{layer}** | | | |")
        for family in families:
            label = "" if family.label is None else f"`{family.label}`"
            lines.append(f"| `{PREFIX}{family.name}` | {family.kind} | {label} | {family.text} |")
    return HEAD + "\n".join(lines) + "\n"


def test_the_page_has_the_table_that_the_code_gives() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert table() in text, f"docs/serving.md: its table of metrics should be\n\n{table()}"


def test_the_table_names_each_metric_once() -> None:
    for family in FAMILIES:
        assert table().count(f"`{PREFIX}{family.name}`") == 1
