"""Faults beside the weights: tokenizer, template, generation config, config, golden set, cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from quantgate.drill.artifact import MutableArtifact, NotApplicable
from quantgate.drill.fault import EVERY, AnyFault, ArtifactFault, GoldenFault, SwappedFault
from quantgate.drill.weight_faults import weight_faults
from quantgate.files import read_json, write_text
from quantgate.quality.golden import ITEMS_NAME

_FILES = "{id: files, metric: audit/file_difference.count, test: limit, max: 0 count}"
_CONFIG = "{id: config, metric: audit/config_difference.count, test: limit, max: 0 count}"


def file_faults() -> list[AnyFault]:
    return [
        _fault("template-dropped", "the chat template is missing", _drop_template, _FILES),
        _fault("bos-dropped", "the chat template no longer begins with the first token", _drop_bos,
               _FILES),
        _fault("eos-changed", "another end token in generation_config.json",
               lambda a: a.edit_json("generation_config.json", eos_token_id=0), _FILES),
        _fault("temperature-changed", "generation_config.json samples at temperature 0.7",
               lambda a: a.edit_json("generation_config.json", temperature=0.7, do_sample=True),
               _FILES),
        _fault("padding-side", "the tokenizer left on the other padding side, as calibration may",
               _flip_padding, _FILES),
        _fault("tokenizer-swapped", "two ids swapped in the tokenizer", _swap_ids, _FILES),
        _fault("rope-base-changed", "another rotary base in config.json", _change_rope, _CONFIG),
        SwappedFault(
            name="stale-cache", what="other weights under the path and manifest of the sound ones",
            schemes=EVERY, expected="digest", plant=_first("one-scale-x16", "neighbours-weights"),
        ),
        GoldenFault(
            name="golden-edited", what="one character of one golden item changed", schemes=EVERY,
            expected="lock", plant=_edit_one_character,
        ),
    ]  # fmt: skip


def _fault(
    name: str, what: str, plant: Callable[[MutableArtifact], None], advice: str
) -> ArtifactFault:
    return ArtifactFault(
        name=name, what=what, schemes=EVERY, expected="audit", plant=plant, advice=advice
    )


def _drop_template(artifact: MutableArtifact) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = artifact.folder / name
        if name.endswith(".jinja") and path.is_file():
            artifact.remove(name)
            return
        if path.is_file() and "chat_template" in read_json(path):
            artifact.edit_json(name, chat_template=None)
            return
    raise NotApplicable("it has no chat template")


def _drop_bos(artifact: MutableArtifact) -> None:
    name = "chat_template.jinja"
    path = artifact.folder / name
    is_file = path.is_file()
    template = path.read_text(encoding="utf-8") if is_file else _stored_template(artifact)
    without = template.replace("{{ bos_token }}", "").replace("{{- bos_token }}", "")
    if without == template:
        raise NotApplicable("its chat template does not begin with bos_token")
    if is_file:
        write_text(path, without)
    else:
        artifact.edit_json("tokenizer_config.json", chat_template=without)


def _stored_template(artifact: MutableArtifact) -> str:
    path = artifact.folder / "tokenizer_config.json"
    return str(read_json(path).get("chat_template") or "") if path.is_file() else ""


def _flip_padding(artifact: MutableArtifact) -> None:
    path = artifact.folder / "tokenizer_config.json"
    side = read_json(path).get("padding_side", "right") if path.is_file() else "right"
    artifact.edit_json(path.name, padding_side="left" if side == "right" else "right")


def _swap_ids(artifact: MutableArtifact) -> None:
    path = artifact.folder / "tokenizer.json"
    if not path.is_file():
        raise NotApplicable("it has no tokenizer.json")
    value = read_json(path)
    vocabulary = value["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise NotApplicable("its vocabulary is no mapping")
    tokens = sorted(vocabulary, key=lambda token: int(vocabulary[token]))
    first, second = tokens[len(tokens) // 2], tokens[len(tokens) // 2 + 1]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    write_text(path, json.dumps(value, ensure_ascii=False))


def _change_rope(artifact: MutableArtifact) -> None:
    config = read_json(artifact.folder / "config.json")
    if "rope_parameters" in config:
        base = float(config["rope_parameters"].get("rope_theta", 10_000.0))
        rope = config["rope_parameters"] | {"rope_theta": base * 2}
        artifact.edit_json("config.json", rope_parameters=rope)
    elif "rope_theta" in config:
        artifact.edit_json("config.json", rope_theta=float(config["rope_theta"]) * 2)
    else:
        raise NotApplicable("it has no rotary positions")


def _first(*names: str) -> Callable[[MutableArtifact], None]:
    """The first fault of these that the artifact's scheme can have."""

    def plant(artifact: MutableArtifact) -> None:
        from quantgate.drill.coverage_faults import coverage_faults

        known = [*weight_faults(), *coverage_faults()]
        for fault in known:
            if fault.name in names and artifact.scheme in fault.schemes:
                fault.plant(artifact)
                return
        raise NotApplicable("no fault for its scheme")

    return plant


def _edit_one_character(folder: Path) -> None:
    path = folder / ITEMS_NAME
    lines = path.read_text(encoding="utf-8").split("\n")
    item = json.loads(lines[0])
    text = item["input"] if isinstance(item["input"], str) else item["input"][-1]["content"]
    changed = text[:-1] + ("b" if text[-1] == "a" else "a")
    lines[0] = lines[0].replace(json.dumps(text)[1:-1], json.dumps(changed)[1:-1], 1)
    if json.loads(lines[0]) == item:
        # Text that is stored with other escapes than json.dumps writes.
        if isinstance(item["input"], str):
            item["input"] = changed
        else:
            item["input"][-1]["content"] = changed
        lines[0] = json.dumps(item, ensure_ascii=False)
    write_text(path, "\n".join(lines))
