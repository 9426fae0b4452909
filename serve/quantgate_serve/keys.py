"""API keys and the tenants they belong to; only hashes are kept.

Makes a key and shows it once: `python -m quantgate_serve.keys new TENANT --file keys.yaml`.

A key holds 256 random bits, which nobody can search for, so one SHA-256 is enough at rest; a slow
hash such as scrypt would cost every request tens of milliseconds and protect nothing more.
"""

import argparse
import hashlib
import hmac
import os
import secrets
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PriorityName = Literal["interactive", "normal", "bulk"]
ALL_CLASSES: tuple[PriorityName, ...] = ("interactive", "normal", "bulk")
_PREFIX = "qg"
_NO_HASH = "0" * 64


class KeysError(Exception):
    """The keys file is wrong or cannot be changed as asked; the message says how."""


class StoredKey(BaseModel):
    """A key as it is kept: `id` is its public part, `sha256` the digest of the whole key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created_at: str = Field(min_length=1)


class Tenant(BaseModel):
    """Who asks: what they may ask for, and their share of the engine.

    `weight` is the tenant's share relative to the others of the same class. An `operator` also
    reads what concerns all tenants: metrics and debugging pages.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    classes: tuple[PriorityName, ...] = Field(default=ALL_CLASSES, min_length=1)
    weight: float = Field(default=1.0, gt=0.0)
    operator: bool = False
    keys: tuple[StoredKey, ...] = ()

    @property
    def default_class(self) -> PriorityName:
        return "normal" if "normal" in self.classes else self.classes[0]


# Without a keys file everybody who reaches the port is this tenant; it has no name.
EVERYBODY = Tenant.model_construct(name="", operator=True)


class KeysFile(BaseModel):
    """keys.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    tenants: tuple[Tenant, ...] = ()

    @model_validator(mode="after")
    def _names_and_ids_are_unique(self) -> "KeysFile":
        ids = [key.id for tenant in self.tenants for key in tenant.keys]
        for what, values in (("tenant", [t.name for t in self.tenants]), ("key id", ids)):
            doubled = [value for value, count in Counter(values).items() if count > 1]
            if doubled:
                raise ValueError(f"{what} {doubled[0]!r} occurs twice; remove one.")
        return self


class Keyring:
    """Finds the tenant of a key."""

    def __init__(self, file: KeysFile) -> None:
        self.take(file)

    def take(self, file: KeysFile) -> None:
        """Hold the keys of `file` from now on, and no others."""
        self.tenants = {tenant.name: tenant for tenant in file.tenants}
        self._by_id = {
            key.id: (key.sha256, tenant) for tenant in file.tenants for key in tenant.keys
        }

    @property
    def num_keys(self) -> int:
        return len(self._by_id)

    def tenant_of(self, key: str) -> Tenant | None:
        """The tenant that `key` belongs to, or None. Takes the same time for any wrong secret."""
        parts = key.split("_", 2)
        key_id = parts[1] if len(parts) == 3 else ""
        expected, tenant = self._by_id.get(key_id, (_NO_HASH, None))
        is_right = hmac.compare_digest(_digest(key), expected)
        return tenant if is_right else None


def read_keys(path: Path) -> KeysFile:
    """Read a keys file (YAML, or JSON, which is YAML).

    Raises:
        KeysError: unreadable, not YAML, or not of this schema.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeysError(
            f"{path} cannot be read ({error.strerror}). "
            "Make a first key: python -m quantgate_serve.keys new TENANT --file " + str(path)
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KeysError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise KeysError(f"{path} holds {type(values).__name__}, expected a mapping with tenants.")
    try:
        return KeysFile.model_validate(values)
    except ValidationError as error:
        raise KeysError(f"{path}: {_first_of(error)}") from error


def add_key(
    file: KeysFile,
    name: str,
    *,
    classes: tuple[PriorityName, ...] | None = None,
    weight: float | None = None,
    operator: bool | None = None,
) -> tuple[KeysFile, str]:
    """`file` with one more key of tenant `name` (made if new, changed where told), and the key.

    Raises:
        ValidationError: a name or value that the schema refuses.
    """
    key_id = secrets.token_hex(4)
    key = f"{_PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    stored = StoredKey(
        id=key_id,
        sha256=_digest(key),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    old = next((tenant for tenant in file.tenants if tenant.name == name), None)
    base = Tenant(name=name) if old is None else old
    tenant = Tenant(
        name=name,
        classes=base.classes if classes is None else classes,
        weight=base.weight if weight is None else weight,
        operator=base.operator if operator is None else operator,
        keys=(*base.keys, stored),
    )
    others = tuple(other for other in file.tenants if other is not old)
    return KeysFile(tenants=(*others, tenant)), key


def revoke_key(file: KeysFile, key_id: str) -> KeysFile:
    """`file` without the key `key_id`.

    Raises:
        KeysError: there is no such key.
    """
    if not any(key.id == key_id for tenant in file.tenants for key in tenant.keys):
        known = ", ".join(key.id for tenant in file.tenants for key in tenant.keys) or "none"
        raise KeysError(f"there is no key {key_id!r}; the file has: {known}.")
    return KeysFile(
        tenants=tuple(
            tenant.model_copy(
                update={"keys": tuple(key for key in tenant.keys if key.id != key_id)}
            )
            for tenant in file.tenants
        )
    )


def write_keys(file: KeysFile, path: Path) -> None:
    """Replace `path` whole, readable for its owner only."""
    text = yaml.safe_dump(file.model_dump(mode="json"), sort_keys=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Make, list or revoke keys. Exit code 2 when the file or a value is refused."""
    arguments = _parser().parse_args(argv)
    path: Path = arguments.file
    try:
        file = read_keys(path) if path.exists() or arguments.command != "new" else KeysFile()
        if arguments.command == "new":
            file, key = add_key(
                file,
                arguments.tenant,
                classes=arguments.classes,
                weight=arguments.weight,
                operator=arguments.operator,
            )
            write_keys(file, path)
            sys.stdout.write(f"{key}\n")
            sys.stderr.write(
                f"This key of {arguments.tenant} is shown once; {path} keeps its hash.\n"
            )
        elif arguments.command == "revoke":
            write_keys(revoke_key(file, arguments.key_id), path)
        else:
            for tenant in file.tenants:
                for stored in tenant.keys:
                    sys.stdout.write(
                        f"{stored.id}  {tenant.name}  {','.join(tenant.classes)}  "
                        f"weight {tenant.weight:g}  {stored.created_at}"
                        f"{'  operator' if tenant.operator else ''}\n"
                    )
    except (KeysError, ValidationError, OSError) as error:
        reason = _first_of(error) if isinstance(error, ValidationError) else error
        sys.stderr.write(f"error: {reason}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quantgate_serve.keys",
        description="API keys of a server. A running server follows the file.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a key for a tenant and show it once")
    new.add_argument("tenant", help="letters, digits, dots and dashes")
    new.add_argument("--classes", type=_classes, help="allowed priorities, comma-separated")
    new.add_argument("--weight", type=float, help="share beside other tenants (default 1)")
    new.add_argument("--operator", action=argparse.BooleanOptionalAction, help="may read /metrics")
    listing = commands.add_parser("list", help="show ids and tenants")
    revoke = commands.add_parser("revoke", help="forget a key")
    revoke.add_argument("key_id", help="the eight digits after qg_")
    for command in (new, listing, revoke):
        command.add_argument("--file", type=Path, default=Path("keys.yaml"), help="the keys file")
    return parser


def _classes(text: str) -> tuple[PriorityName, ...]:
    wanted = text.split(",")
    unknown = [name for name in wanted if name not in ALL_CLASSES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(ALL_CLASSES)}")
    return tuple(name for name in ALL_CLASSES if name in wanted)


def _first_of(error: ValidationError) -> str:
    """Where the first thing is that the schema refuses, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg']}"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
