"""Weights change to what serving.yaml says, or the old ones go on serving and it is said why."""

import argparse
import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantgate_serve import reload as reload_module
from quantgate_serve.__main__ import _settings
from quantgate_serve.channel import Loaded
from quantgate_serve.client import EngineClient
from quantgate_serve.config import ServerSettings, sha256_of
from quantgate_serve.engine_child import EngineThread
from quantgate_serve.reload import Reload, ReloadRefusedError
from quantgate_serve.vocabulary import Vocabulary

Switched = tuple[Vocabulary, Loaded]


class Promotions:
    """A serving.yaml, and variants to promote into it."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source = root, source
        self.path = root / "serve" / "serving.yaml"
        self.path.parent.mkdir()
        self.num_reads = 0

    def build(self, name: str) -> Path:
        return Path(shutil.copytree(self.source, self.root / name))

    def promote(self, name: str, *, digit: str = "0") -> None:
        folder = self.root / name
        champion = {
            "name": name,
            "path": name,
            "scheme": "bf16",
            "artifact_sha256": digit * 64,
            "files": {path.name: sha256_of(path) for path in folder.iterdir()},
            "release": "r1",
            "verdicts_sha256": "0" * 64,
            "promoted_at": "2026-11-24T00:00:00Z",
        }
        new = self.path.with_suffix(".new")
        new.write_text(yaml.safe_dump({"model_name": "demo", "champion": champion}))
        new.replace(self.path)

    def settings(self) -> ServerSettings:
        self.num_reads += 1
        return _settings(
            argparse.Namespace(config=self.path, device="cpu", threads=1, kv_tokens=512)
        )


@pytest.fixture
def promotions(tmp_path: Path, llama_folder: Path) -> Promotions:
    made = Promotions(tmp_path, llama_folder)
    made.build("first")
    made.promote("first")
    return made


def reloading(
    promotions: Promotions, work: Callable[[EngineClient, Reload, list[Switched]], Any]
) -> None:
    """Runs `work` beside an engine that serves the promoted weights."""

    async def run() -> None:
        engine = EngineClient(promotions.settings(), launch=EngineThread)
        await engine.start()
        async with asyncio.timeout(60):
            while not engine.is_warm:
                await asyncio.sleep(0.01)
            switched: list[Switched] = []
            reload = Reload(
                engine,
                promotions.settings,
                on_switch=lambda *new: switched.append(new),
                watched=promotions.path,
            )
            try:
                await work(engine, reload, switched)
            finally:
                await engine.stop()

    asyncio.run(run())


def test_a_promoted_variant_is_taken_over(promotions: Promotions) -> None:
    async def work(engine: EngineClient, reload: Reload, switched: list[Switched]) -> None:
        folder = promotions.build("second")
        promotions.promote("second", digit="1")
        reloaded = await reload.now()
        assert (reloaded.model, reloaded.artifact_sha256) == (folder, "1" * 64)
        assert (reloaded.epoch, engine.epoch, len(switched)) == (1, 1, 1)
        assert engine.settings.model == folder

    reloading(promotions, work)


def test_weights_that_serve_already_are_left_alone(promotions: Promotions) -> None:
    async def work(engine: EngineClient, reload: Reload, switched: list[Switched]) -> None:
        reloaded = await reload.now()
        assert (reloaded.how, reloaded.epoch) == ("these weights serve already", 0)
        assert switched == []

    reloading(promotions, work)


def flip_a_byte(promotions: Promotions) -> None:
    weights = promotions.root / "second" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def remove_the_weights(promotions: Promotions) -> None:
    (promotions.root / "second" / "model.safetensors").unlink()
    promotions.promote("second", digit="1")


def change_the_tokenizer(promotions: Promotions) -> None:
    tokenizer = promotions.root / "second" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    promotions.promote("second", digit="1")


def spoil_the_file(promotions: Promotions) -> None:
    promotions.path.write_text("champion: 3")


def claim_an_unknown_architecture(promotions: Promotions) -> None:
    config = promotions.root / "second" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"t5"'))
    promotions.promote("second", digit="1")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip_a_byte, "has sha256"),
        (remove_the_weights, r"no \*\.safetensors"),
        (change_the_tokenizer, "another vocabulary"),
        (spoil_the_file, "model_name"),
        (claim_an_unknown_architecture, "t5"),
    ],
)
def test_what_cannot_be_served_leaves_the_old_weights_serving(
    spoil: Callable[[Promotions], None],
    reason: str,
    promotions: Promotions,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(engine: EngineClient, reload: Reload, switched: list[Switched]) -> None:
        promotions.build("second")
        promotions.promote("second", digit="1")
        spoil(promotions)
        with pytest.raises(ReloadRefusedError, match=reason):
            await reload.now()
        assert engine.is_warm
        assert engine.settings.model == promotions.root / "first"
        assert (engine.epoch, switched) == (0, [])
        assert "goes on serving" in caplog.text

    reloading(promotions, work)


def test_a_change_of_the_file_is_noticed_and_a_refused_one_is_not_tried_again(
    promotions: Promotions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload_module, "_POLL_S", 0.02)

    async def work(engine: EngineClient, reload: Reload, switched: list[Switched]) -> None:
        watching = asyncio.create_task(reload.watch())
        promotions.build("second")
        promotions.num_reads = 0
        promotions.path.write_text("champion: 3")
        await asyncio.sleep(0.3)
        assert promotions.num_reads == 1
        promotions.promote("second", digit="1")
        while engine.epoch == 0:
            await asyncio.sleep(0.01)
        assert engine.settings.artifact_sha256 == "1" * 64
        watching.cancel()

    reloading(promotions, work)


def test_a_second_reload_waits_for_the_first(promotions: Promotions) -> None:
    async def work(engine: EngineClient, reload: Reload, switched: list[Switched]) -> None:
        promotions.build("second")
        promotions.promote("second", digit="1")
        first, second = await asyncio.gather(reload.now(), reload.now())
        assert (first.epoch, second.epoch) == (1, 1)
        assert second.how == "these weights serve already"

    reloading(promotions, work)
