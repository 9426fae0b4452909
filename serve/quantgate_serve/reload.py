"""Takes over the weights that serving.yaml names now, while the server serves.

Asked by SIGHUP, by POST /admin/reload, or by a change of the file. Whatever is wrong with the new
weights, the old ones go on serving, and the reason is in the answer and in the log.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantgate_serve.channel import Loaded
from quantgate_serve.client import EngineClient, EngineStoppedError, ModelRefusedError
from quantgate_serve.config import ConfigError, ServerSettings
from quantgate_serve.file_version import version_of
from quantgate_serve.vocabulary import Vocabulary

_log = logging.getLogger(__name__)
_POLL_S = 2.0
_TOKENIZER = "tokenizer.json"


class ReloadRefusedError(Exception):
    """The old weights go on serving; the message says why."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What serves now, and how that came about."""

    model: Path
    artifact_sha256: str | None
    epoch: int
    how: str


class Reload:
    """Brings a server to what its configuration says now."""

    def __init__(
        self,
        engine: EngineClient,
        read_settings: Callable[[], ServerSettings],
        *,
        on_switch: Callable[[Vocabulary, Loaded], None],
        watched: Path | None = None,
    ) -> None:
        """
        Args:
            read_settings: reads and verifies; called in a thread, raises ConfigError.
            on_switch: told of the new model once it serves.
            watched: the file whose change asks for a reload (see `watch`).
        """
        self._engine = engine
        self._read_settings = read_settings
        self._on_switch = on_switch
        self._watched = watched
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._seen = version_of(watched)

    async def now(self) -> Reloaded:
        """Serve what the configuration says; nothing happens if that serves already.

        Waits for a reload that is under way first.

        Raises:
            ReloadRefusedError: what it says cannot be served.
        """
        async with self._lock:
            self._seen = version_of(self._watched)
            try:
                reloaded = await self._replace()
            except (ConfigError, ModelRefusedError, EngineStoppedError, OSError) as error:
                model = self._engine.settings.model
                _log.error("the reload was refused, %s goes on serving: %s", model, error)
                raise ReloadRefusedError(str(error)) from error
            _log.info("reload: %s", reloaded.how)
            return reloaded

    def ask(self) -> None:
        """Reload in the background; the log tells the outcome."""
        task = asyncio.get_running_loop().create_task(self._quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def watch(self) -> None:
        """Reload whenever the watched file is another one. What was refused is not tried again."""
        while True:
            await asyncio.sleep(_POLL_S)
            found = await asyncio.to_thread(version_of, self._watched)
            if found is not None and found != self._seen and not self._lock.locked():
                await self._quietly()

    async def _quietly(self) -> None:
        with contextlib.suppress(ReloadRefusedError):  # it is in the log
            await self.now()

    async def _replace(self) -> Reloaded:
        engine, old = self._engine, self._engine.settings
        new = await asyncio.to_thread(self._read_settings)
        if new.artifact_sha256 is not None and _weights(new) == _weights(old):
            return self._reloaded("these weights serve already")
        await asyncio.to_thread(_check_tokenizer, old.model, new.model)
        vocabulary = await asyncio.to_thread(Vocabulary.load, new.model)
        how = await engine.replace(new)
        if engine.loaded is not None:
            self._on_switch(vocabulary, engine.loaded)
        return self._reloaded(how)

    def _reloaded(self, how: str) -> Reloaded:
        settings = self._engine.settings
        return Reloaded(settings.model, settings.artifact_sha256, self._engine.epoch, how)


def _weights(settings: ServerSettings) -> tuple[Path, str | None]:
    return settings.model, settings.artifact_sha256


def _check_tokenizer(old: Path, new: Path) -> None:
    """Prompts on their way were made with the old tokenizer, so the new weights must share it."""
    ours, theirs = old / _TOKENIZER, new / _TOKENIZER
    if ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes():
        return
    if not ours.is_file() and not theirs.is_file() and old == new:
        return
    raise ConfigError(
        f"{theirs} is not the tokenizer that serves now ({ours}). "
        "Start the server again to serve a model with another vocabulary."
    )
