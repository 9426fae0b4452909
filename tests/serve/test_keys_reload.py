"""A running server follows its keys file; while that is broken the keys before it hold."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from quantgate_serve import keys_reload
from quantgate_serve.keys import Keyring, KeysFile, add_key, read_keys, revoke_key, write_keys
from quantgate_serve.keys_reload import KeysReload


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_reload, "_POLL_S", 0.02)


def id_of(key: str) -> str:
    return key.split("_")[1]


def follow(path: Path, ring: Keyring, work: Callable[[KeysReload], Awaitable[None]]) -> None:
    """Do `work` while `ring` follows `path`."""

    async def run() -> None:
        reload = KeysReload(path, ring)
        watching = asyncio.create_task(reload.watch())
        try:
            await work(reload)
        finally:
            watching.cancel()

    asyncio.run(run())


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)


def test_a_changed_file_lets_the_new_key_in_and_the_revoked_one_out(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    file, old = add_key(KeysFile(), "acme")
    write_keys(file, path)
    ring = Keyring(read_keys(path))

    async def work(_: KeysReload) -> None:
        both, new = add_key(file, "umbrella")
        write_keys(both, path)
        await until(lambda: ring.tenant_of(new) is not None)
        assert ring.tenant_of(old) is not None
        write_keys(revoke_key(both, id_of(old)), path)
        await until(lambda: ring.tenant_of(old) is None)
        assert ring.tenant_of(new) is not None

    follow(path, ring, work)


@pytest.mark.parametrize("broken", ["tenants: [", "- a\n", "tenants: [{name: '!'}]\n", None])
def test_a_broken_or_missing_file_keeps_the_old_keys_and_is_told_once(
    tmp_path: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    file, key = add_key(KeysFile(), "acme")
    write_keys(file, path)
    ring = Keyring(read_keys(path))

    def told() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]

    async def work(reload: KeysReload) -> None:
        await until(lambda: any("read again" in record.message for record in caplog.records))
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        await until(lambda: bool(told()))
        assert str(path) in told()[0]
        await asyncio.sleep(0.1)
        assert len(told()) == 1
        assert ring.tenant_of(key) is not None
        reload.ask()  # asked for, it is tried again
        await until(lambda: len(told()) == 2)
        assert ring.tenant_of(key) is not None
        write_keys(KeysFile(), path)
        await until(lambda: ring.tenant_of(key) is None)

    with caplog.at_level(logging.INFO):
        follow(path, ring, work)
