"""Keys are shown once, kept as hashes, and lead to one tenant."""

import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from quantgate_serve.keys import (
    Keyring,
    KeysError,
    KeysFile,
    StoredKey,
    Tenant,
    add_key,
    main,
    read_keys,
    revoke_key,
)


def stored(key_id: str) -> StoredKey:
    return StoredKey(id=key_id, sha256="a" * 64, created_at="2026-11-24")


def test_a_key_leads_to_its_tenant_and_only_that_key_does() -> None:
    file, first = add_key(KeysFile(), "acme")
    file, second = add_key(file, "umbrella", classes=("bulk",), weight=2.0)
    ring = Keyring(file)
    found = [ring.tenant_of(key) for key in (first, second)]
    assert [tenant.name for tenant in found if tenant is not None] == ["acme", "umbrella"]
    for wrong in (
        "",
        first[:-1],
        first + "x",
        first.replace("qg", "QG"),
        "qg_00000000_x",
        "\ud800",
    ):
        assert ring.tenant_of(wrong) is None


def test_another_key_s_id_does_not_help_a_wrong_secret() -> None:
    file, first = add_key(KeysFile(), "acme")
    file, second = add_key(file, "umbrella")
    mixed = "_".join([*first.split("_", 2)[:2], second.split("_", 2)[2]])
    assert Keyring(file).tenant_of(mixed) is None


def test_a_revoked_key_is_nobodys_and_the_tenants_other_key_stays() -> None:
    file, first = add_key(KeysFile(), "acme", operator=True)
    file, second = add_key(file, "acme")
    ring = Keyring(revoke_key(file, first.split("_")[1]))
    assert ring.tenant_of(first) is None
    tenant = ring.tenant_of(second)
    assert tenant is not None
    assert tenant.operator
    with pytest.raises(KeysError, match="there is no key 'ffffffff'"):
        revoke_key(file, "ffffffff")


def test_the_tool_shows_a_key_once_and_the_file_has_only_its_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.yaml"
    options = ["--classes", "bulk,interactive", "--weight", "0.5", "--file", str(path)]
    assert main(["new", "acme", *options]) == 0
    key = capsys.readouterr().out.strip()
    secret = key.split("_", 2)[2]
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tenant = Keyring(read_keys(path)).tenant_of(key)
    assert tenant is not None
    assert (tenant.classes, tenant.weight) == (("interactive", "bulk"), 0.5)
    assert tenant.default_class == "interactive"
    assert main(["list", "--file", str(path)]) == 0
    assert secret not in capsys.readouterr().out
    assert main(["revoke", key.split("_")[1], "--file", str(path)]) == 0
    assert Keyring(read_keys(path)).tenant_of(key) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tenants: [", "is not YAML"),
        ("- a", "holds list"),
        ("tenants: [{name: a b}]", "tenants.0.name"),
        ("tenants: [{name: a, weight: 0}]", "weight"),
        ("tenants: [{name: a, weight: .nan}]", "weight"),
        ("tenants: [{name: a, classes: [urgent]}]", "classes"),
        ("tenants: [{name: a, classes: []}]", "classes"),
        ("tenants: [{name: a, keys: [{id: x}]}]", "keys"),
        ("tenants: [{name: a}, {name: a}]", "tenant 'a' occurs twice"),
        ("schema_version: 2", "schema_version"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysError, match=reason):
        read_keys(path)
    assert main(["list", "--file", str(path)]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["new", "a b"], "error: name: String should match pattern"),
        (["new", "a", "--weight", "0"], "error: weight: Input should be greater than 0"),
        (["revoke", "00000000"], "error: there is no key '00000000'; the file has: none."),
    ],
)
def test_the_tool_refuses_a_value_in_one_line(
    tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("tenants: []")
    assert main([*options, "--file", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(reason)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"quantgate_serve\.keys new"):
        read_keys(tmp_path / "keys.yaml")


def test_two_keys_cannot_share_an_id() -> None:
    with pytest.raises(ValidationError, match="key id '00000000' occurs twice"):
        KeysFile(
            tenants=(
                Tenant(name="a", keys=(stored("00000000"),)),
                Tenant(name="b", keys=(stored("00000000"),)),
            )
        )
