"""Small golden sets on disk, a tokenizer, and a fake server that answers completions."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Completion = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]
TEXT_TASK = {
    "task": "small",
    "output_type": "generate_until",
    "generation_kwargs": {"max_gen_toks": 8, "until": ["\n"]},
    "metric_list": [{"metric": "exact_match"}],
}
CHOICE_TASK = {
    "task": "small",
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "exact_match"}],
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="session")
def text_task() -> dict[str, Any]:
    return TEXT_TASK


@pytest.fixture(scope="session")
def choice_task() -> dict[str, Any]:
    return CHOICE_TASK


@pytest.fixture
def write_set(tmp_path: Path) -> Callable[..., Path]:
    """Writes a golden set named `small`; a line that is text is written as it is."""

    def write(*lines: dict[str, Any] | str, task: dict[str, Any] = TEXT_TASK) -> Path:
        folder = tmp_path / "small"
        folder.mkdir(exist_ok=True)
        (folder / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
        texts = [
            line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
            for line in lines
        ]
        (folder / "items.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a tokenizer of one token per byte; `merge` joins one pair of letters.

    `added` are tokens beside those, one for each of these texts.
    """

    def make(
        *,
        merge: tuple[str, str] | None = None,
        template: str | None = TEMPLATE,
        added: Sequence[str] = (),
    ) -> Path:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*letters, *(["".join(merge)] if merge else [])]
        raw = Tokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)}, merges=[merge] if merge else []
            )
        )
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.decoder = decoders.ByteLevel()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
        fast.chat_template = template
        fast.add_tokens([AddedToken(text) for text in added])
        folder = tmp_path_factory.mktemp("tokenizer")
        fast.save_pretrained(folder)
        return folder

    return make


@contextmanager
def fake_server(complete: Completion) -> Iterator[str]:
    """Serves POST /v1/completions in a thread; `complete` gives a status and JSON (or text)."""
    loop = asyncio.new_event_loop()

    async def handle(request: web.Request) -> web.Response:
        status, value = await complete(await request.json())
        text = value if isinstance(value, str) else json.dumps(value)
        return web.Response(status=status, text=text)

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_post("/v1/completions", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, int(runner.addresses[0][1])

    runner, port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def serve() -> Callable[[Completion], Any]:
    return fake_server
