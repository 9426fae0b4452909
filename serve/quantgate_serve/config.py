"""What people and `quantgate promote` write for the server: process settings and serving.yaml.

Imports neither torch nor transformers, so that the harness can read and write serving.yaml cheaply.
"""

import hashlib
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(Exception):
    """An option or serving.yaml is wrong, or a file that it names; the message says how."""


class ServerSettings(BaseModel):
    """One server process: what it loads, where it listens, how much it takes on."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Path
    # The champion's, where serving.yaml says what to serve.
    artifact_sha256: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    ready_file: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    # None leaves the number of threads to torch.
    threads: int | None = Field(default=None, ge=1)
    # Attention and norms on a CPU in C, compiled at the first start; off leaves them to torch.
    native_kernels: Literal["auto", "off"] = "auto"
    max_batch_size: int = Field(default=64, ge=1)
    max_batched_tokens: int = Field(default=512, ge=1)
    # None serves the model's whole context. A model with a sliding window needs at most its window.
    max_context: int | None = Field(default=None, ge=1)
    # None sizes the pool from the context length, the batch size and the memory that is there.
    kv_tokens: int | None = Field(default=None, ge=16)
    max_queued_requests: int = Field(default=1024, ge=1)
    max_queued_tokens: int = Field(default=262_144, ge=1)
    # A class below others that has waited so long gets its part of the engine (see waiting.py).
    aging_s: float = Field(default=5.0, gt=0)
    # How long an idle or underfilled engine may wait for company for a request.
    admission_window_ms: float = Field(default=0.0, ge=0, le=50)
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    # How long a client may take for its headers, for its body, and to read what waits for it.
    headers_timeout_s: float = Field(default=20.0, gt=0)
    body_timeout_s: float = Field(default=60.0, gt=0)
    read_timeout_s: float = Field(default=60.0, gt=0)
    # Identical greedy requests of a tenant that are under way are computed once.
    coalescing: bool = True
    # Answers of greedy requests and embeddings, kept for `cache_ttl_s`; 0 keeps none.
    response_cache_mib: float = Field(default=0.0, ge=0)
    embedding_cache_mib: float = Field(default=0.0, ge=0)
    cache_ttl_s: float = Field(default=600.0, gt=0)
    # Hashes of API keys (keys.py); without them whoever reaches the port may ask.
    api_keys: Path | None = None
    allow_remote_without_keys: bool = False
    drain_timeout_s: float = Field(default=20.0, ge=0)
    # An engine that has work and says nothing for so long is killed and started again.
    engine_timeout_s: float = Field(default=60.0, gt=0)
    # The same while it loads and warms up: reading the weights says nothing either.
    engine_start_timeout_s: float = Field(default=900.0, gt=0)
    # Deaths without a minute of service between them; with one more the server exits.
    max_engine_restarts: int = Field(default=5, ge=0)
    # False computes in a thread of the server's own process, for debuggers and profilers.
    engine_process: bool = True
    served_model_name: str | None = None
    prefix_cache: bool = True
    # Most tokens that the prefix cache remembers; None lets it have the whole pool.
    prefix_cache_tokens: int | None = Field(default=None, ge=16)
    # Check the books of KV pages whenever the engine runs out of work.
    check_integrity: bool = False
    # Also export the metrics that vLLM has under vLLM's own names.
    metrics_compat: Literal["vllm"] | None = None
    # Where spans go (OTLP over HTTP); None makes none.
    otlp_traces_endpoint: str | None = None
    # What the variant measured when it was promoted, from serving.yaml: alerts compare with it.
    slo: dict[str, float] = {}

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.name

    @model_validator(mode="after")
    def _remote_clients_have_keys(self) -> Self:
        if not (_is_loopback(self.host) or self.api_keys or self.allow_remote_without_keys):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and without --api-keys "
                "anybody there may use the model. Give --api-keys FILE, listen on 127.0.0.1, "
                "or say --allow-remote-without-keys."
            )
        return self


class ServedVariant(BaseModel):
    """A variant that was judged and approved, with the digests that pin its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    scheme: str = Field(min_length=1)
    artifact_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: dict[str, str] = Field(min_length=1)
    release: str = Field(min_length=1)
    verdicts_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    promoted_at: str = Field(min_length=1)
    slo: dict[str, float] = {}


class ServingConfig(BaseModel):
    """serving.yaml: what serves now, what served before, what is tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model_name: str = Field(min_length=1)
    champion: ServedVariant | None = None
    previous: ServedVariant | None = None
    canary: ServedVariant | None = None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(host: str, port: int) -> str:
    """Where a server listens, for clients."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def settings_of(options: dict[str, Any]) -> ServerSettings:
    """The settings that `options` ask for, by the names of the fields.

    Raises:
        ConfigError: one is refused.
    """
    try:
        return ServerSettings.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # said by a validator of this file, about several of them
            raise ConfigError(str(first["ctx"]["error"])) from error
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise ConfigError(f"{option} {first['input']}: {first['msg']}.") from error


def read_serving_config(path: Path) -> ServingConfig:
    """Read serving.yaml.

    Raises:
        ConfigError: unreadable, not YAML, or not of this schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}). "
            "Promote a variant first: quantgate promote writes this file."
        ) from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected a mapping of keys.")
    try:
        return ServingConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: {where}: {first['msg']} ({error.error_count()} problem(s)). "
            "The file is written by quantgate promote; undo hand edits or promote again."
        ) from error


def champion_folder(config: ServingConfig, path: Path) -> Path:
    """The champion's folder, a relative path being relative to the folder that holds `serve/`.

    Raises:
        ConfigError: nothing is promoted, or the folder is missing.
    """
    if config.champion is None:
        raise ConfigError(
            f"{path} has no champion, so there is nothing to serve. Run quantgate promote."
        )
    folder = Path(config.champion.path)
    if not folder.is_absolute():
        folder = path.resolve().parent.parent / folder
    if not folder.is_dir():
        raise ConfigError(
            f"{path}: champion {config.champion.name}: {folder} is not a folder. "
            "Rebuild the variant, or roll back."
        )
    return folder


def verify_files(variant: ServedVariant, folder: Path) -> None:
    """Compare every file of `folder` with its digest.

    Raises:
        ConfigError: a file is missing, was added, or holds other bytes.
    """
    present = {
        found.relative_to(folder).as_posix() for found in folder.rglob("*") if found.is_file()
    }
    # The manifest describes the other files and does not list itself.
    unlisted = sorted(present - set(variant.files) - {"variant.json"})
    if unlisted:
        raise ConfigError(
            f"{folder}/{unlisted[0]} is not among the files of the promoted {variant.name}. "
            "Remove it, or build, judge and promote the variant again."
        )
    for name, expected in sorted(variant.files.items()):
        if name not in present:
            raise ConfigError(
                f"{folder}/{name} is missing. Restore it, or build the variant again."
            )
        found = sha256_of(folder / name)
        if found != expected:
            raise ConfigError(
                f"{folder}/{name} has sha256 {found}, but "
                f"{expected}. It is not what was approved: restore the file, or "
                "build, judge and promote again."
            )


def sha256_of(path: Path) -> str:
    """The hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
