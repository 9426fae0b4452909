"""Follows the keys file while the server serves: new keys are let in, revoked ones are not.

Looked at every two seconds, and on SIGHUP. While the file cannot be used the keys read before hold,
and the log says why. A request that was let in is finished.
"""

import asyncio
import contextlib
import logging
from pathlib import Path

from quantgate_serve.file_version import version_of
from quantgate_serve.keys import Keyring, KeysError, read_keys

_log = logging.getLogger(__name__)
_POLL_S = 2.0


class KeysReload:
    """Keeps a keyring at what its file says."""

    def __init__(self, path: Path, keyring: Keyring) -> None:
        """`keyring` holds what `path` said a moment ago; its keys are replaced in place."""
        self._path = path
        self._keyring = keyring
        self._asked = asyncio.Event()
        # Of no version yet: a change between that reading and now is not missed.
        self._seen: tuple[int, int, int] | None = None

    def ask(self) -> None:
        """Have `watch` read the file now, be it another one or not."""
        self._asked.set()

    async def watch(self) -> None:
        """Read the file whenever it is another one. What cannot be used is not tried again."""
        while True:
            found = await asyncio.to_thread(version_of, self._path)
            if found != self._seen or self._asked.is_set():
                self._asked.clear()
                self._seen = found
                await self._read()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), _POLL_S)

    async def _read(self) -> None:
        try:
            file = await asyncio.to_thread(read_keys, self._path)
        except KeysError as error:
            _log.error("the API keys were not read again, those from before hold: %s", error)
            return
        before = self._keyring.num_keys
        self._keyring.take(file)
        _log.info("API keys: %d read again, %d before", self._keyring.num_keys, before)
