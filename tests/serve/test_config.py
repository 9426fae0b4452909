"""serving.yaml: read, refused, verified."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from quantgate_serve.config import (
    ConfigError,
    ServedVariant,
    champion_folder,
    read_serving_config,
    settings_of,
    sha256_of,
    url_of,
    verify_files,
)

DIGEST = "0" * 64


def variant_of(folder: Path, **changes: Any) -> dict[str, Any]:
    files = {path.name: sha256_of(path) for path in folder.iterdir()}
    values = {
        "name": "int8",
        "path": str(folder),
        "scheme": "int8-bnb",
        "artifact_sha256": DIGEST,
        "files": files,
        "release": "r1",
        "verdicts_sha256": DIGEST,
        "promoted_at": "2026-11-24T00:00:00Z",
    }
    return values | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "store" / "variant"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "config.json").write_text("{}")
    return made


def write_config(tmp_path: Path, **values: Any) -> Path:
    path = tmp_path / "serve" / "serving.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"schema_version": 1, "model_name": "demo"} | values))
    return path


def test_a_champion_is_read_and_its_files_verified(tmp_path: Path, folder: Path) -> None:
    path = write_config(tmp_path, champion=variant_of(folder, slo={"perf/e2e_ms.p95": 80.0}))
    config = read_serving_config(path)
    assert config.champion is not None
    assert champion_folder(config, path) == folder
    verify_files(config.champion, folder)


def test_a_relative_path_starts_beside_the_folder_of_the_config(
    tmp_path: Path, folder: Path
) -> None:
    path = write_config(tmp_path, champion=variant_of(folder, path="store/variant"))
    assert champion_folder(read_serving_config(path), path) == folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"champion": None}, "has no champion"),
        ({"champoin": None}, "champoin: Extra inputs are not permitted"),
        ({"schema_version": 2}, "schema_version"),
        ({"model_name": ""}, "model_name"),
    ],
)
def test_a_wrong_config_is_refused_with_the_place(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    path = write_config(tmp_path, **values)
    with pytest.raises(ConfigError, match=message):
        champion_folder(read_serving_config(path), path)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- a", "holds list"), (None, "cannot be read")]
)
def test_an_unreadable_config_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "serving.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_serving_config(path)


def test_other_bytes_a_missing_file_and_an_added_one_are_refused(folder: Path) -> None:
    variant = ServedVariant.model_validate(variant_of(folder))
    (folder / "added.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"added\.bin is not among"):
        verify_files(variant, folder)
    (folder / "added.bin").unlink()
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ConfigError, match="has sha256"):
        verify_files(variant, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="is missing"):
        verify_files(variant, folder)


def test_the_config_is_read_without_torch() -> None:
    code = (
        "import sys, quantgate_serve.config;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"port": 70000}, "^--port 70000: Input should be less than or equal to 65535.$"),
        ({"max_batch_size": 0}, "^--max-batch-size 0: Input should be greater than or equal to 1"),
        ({"host": "0.0.0.0"}, "^host 0.0.0.0 can be reached from other machines"),
    ],
)
def test_a_refused_option_is_one_line_with_its_name_and_value(
    option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settings_of({"model": Path("model")} | option)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option", ["aging_s", "drain_timeout_s", "response_cache_mib", "engine_timeout_s"]
)
def test_a_bound_that_is_no_number_is_refused_by_its_name(option: str) -> None:
    for value in ("inf", "nan"):
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} {value}: "):
            settings_of({"model": Path("model"), option: float(value)})


def test_the_address_of_a_server_is_a_url_also_with_ipv6() -> None:
    assert url_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert urlsplit(url_of("::1", 8000)).hostname == "::1"
    assert urlsplit(url_of("::1", 8000)).port == 8000
