"""Starts one server for one model: `python -m quantgate_serve --model FOLDER`.

This process serves HTTP and tokenises; the model runs in one that it starts (client.py).
Exit codes: 0 after a drained stop, 1 when the engine failed for good, 2 when the model, the
configuration or an argument is refused.
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from quantgate_serve.caches import BoundedCache
from quantgate_serve.config import (
    ConfigError,
    ServerSettings,
    champion_folder,
    read_serving_config,
    settings_of,
    url_of,
    verify_files,
)
from quantgate_serve.imports import without
from quantgate_serve.keys import Keyring, KeysError, read_keys
from quantgate_serve.model_folder import UnsupportedModelError, check_folder
from quantgate_serve.request import Request

_MAX_FILES = 65_536


def main(argv: list[str] | None = None) -> int:
    """Parse, load, listen, warm up, serve, drain."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = _settings(arguments)
        keyring = Keyring(read_keys(settings.api_keys)) if settings.api_keys else None
        check_folder(settings.model)
    except (ConfigError, KeysError, UnsupportedModelError) as error:
        return _refuse(error)
    # A thread that waits for its sibling gives up its core after some 0.1 ms. libgomp's default
    # spins on: beside one busy process on two cores a 5 M Llama then made 120 tok/s with two
    # threads, instead of 470 to 2,200 (and about 2,000 with one).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN keeps its code for each number of rows and each shape, and torch's layer above it keeps
    # what it made of that a second time; 1,024 entries each by default, some half a megabyte each.
    # A step needs six, and the next one's batch is about as large (docs/serving.md, Speed).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    # transformers logs progress bars and hub lookups; a server does neither.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read by gptqmodel when it is imported; more workers than cores only wait for each other.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported late, so that --help and a refused configuration wait for nothing.
    from quantgate_serve.client import EngineStoppedError, ModelRefusedError
    from quantgate_serve.tracing import TracingUnavailableError

    _allow_many_connections()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named. Without it every answer after a
    # connection's first waits for the client's delayed acknowledgement: 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Taken now, and connections are refused until the model is loaded.
            listener.bind((settings.host, settings.port))
        except OSError as error:
            return _refuse(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}.")
        # Here are only texts and tokens; transformers would import torch for 2 s and 200 MiB.
        unused = ("torch",) if settings.engine_process else ()
        try:
            with without(*unused):
                # Until what is imported and loaded is frozen: it makes no garbage worth a look.
                gc.disable()
                asyncio.run(_serve(settings, listener, arguments, keyring))
        except (ModelRefusedError, TracingUnavailableError) as error:
            return _refuse(error)
        except EngineStoppedError as error:
            logging.error("%s", error)
            return 1
        finally:
            gc.enable()
    return 0


async def _serve(
    settings: ServerSettings,
    listener: socket.socket,
    arguments: argparse.Namespace,
    keyring: Keyring | None,
) -> None:
    """Load, listen, warm up, serve, drain.

    Raises:
        TracingUnavailableError: spans are asked for, and their packages are missing.
        ModelRefusedError: the engine cannot serve this model.
        EngineStoppedError: it died while loading, or too often.
    """
    from quantgate_serve.client import EngineClient
    from quantgate_serve.engine_child import EngineThread, launch_process
    from quantgate_serve.tracing import Spans, export_to

    engine = EngineClient(
        settings, launch=launch_process if settings.engine_process else EngineThread
    )
    spans = None
    if settings.otlp_traces_endpoint is not None:
        provider = export_to(settings.otlp_traces_endpoint)
        spans = Spans(provider, model_name=settings.model_name)
        engine.on_ended.append(spans.add)
    loading = asyncio.create_task(engine.start())
    await asyncio.sleep(0)  # the engine's process begins with its imports, and this one with these
    from quantgate_serve.http.admin import add_admin_routes
    from quantgate_serve.http.app import build_app
    from quantgate_serve.http.connection import Connection
    from quantgate_serve.http.service import HttpLimits, Service
    from quantgate_serve.keys_reload import KeysReload
    from quantgate_serve.reload import Reload
    from quantgate_serve.sharing import Sharing
    from quantgate_serve.vocabulary import Vocabulary

    vocabulary = asyncio.create_task(asyncio.to_thread(Vocabulary.load, settings.model))
    try:
        loaded = await loading
        service = Service(
            engine,
            await vocabulary,
            model_name=settings.model_name,
            vocab_size=loaded.vocab_size,
            eos_ids=loaded.eos_ids,
            limits=HttpLimits(
                max_body_bytes=settings.max_body_bytes, body_timeout_s=settings.body_timeout_s
            ),
            keyring=keyring,
            metrics_compat=settings.metrics_compat,
            sharing=Sharing(
                engine,
                coalesces=settings.coalescing,
                response_cache=_cache(settings.response_cache_mib, settings),
                embedding_cache=_cache(settings.embedding_cache_mib, settings),
            ),
        )

        reload = Reload(
            engine, lambda: _settings(arguments), on_switch=service.switch, watched=arguments.config
        )
        app = build_app(service)
        add_admin_routes(app, service, reload)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            # What a proxy says of its client matters to nobody but /debug, which looks itself.
            proxy_headers=False,
            http=Connection.of(
                headers_timeout_s=settings.headers_timeout_s,
                read_timeout_s=settings.read_timeout_s,
            ),
            timeout_graceful_shutdown=int(settings.drain_timeout_s),
            # Longer than clients pool connections: who closes first loses no request in a race.
            timeout_keep_alive=300,
        )

        class Server(uvicorn.Server):
            """Says where it listens, and that it drains."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                port = listener.getsockname()[1]
                url = url_of(settings.host, port)
                logging.info("serving %s at %s", settings.model_name, url)
                if settings.ready_file is not None:
                    _write_whole(settings.ready_file, json.dumps({"url": url, "pid": os.getpid()}))

            async def on_tick(self, counter: int) -> bool:
                return await super().on_tick(counter) or engine.failure is not None

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                service.is_draining = True
                await super().shutdown(sockets)

        # uvicorn raises the signal again once it has drained; by then it means nothing any more.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        watching = []
        on_hangup: list[Callable[[], object]] = []
        if arguments.config is not None:
            on_hangup.append(reload.ask)
            watching.append(asyncio.create_task(reload.watch()))
        if keyring is not None and settings.api_keys is not None:
            keys = KeysReload(settings.api_keys, keyring)
            on_hangup.append(keys.ask)
            watching.append(asyncio.create_task(keys.watch()))
        if on_hangup:
            asyncio.get_running_loop().add_signal_handler(
                signal.SIGHUP, lambda: [ask() for ask in on_hangup]
            )
        # What has been loaded stays; a collection that a large body sets off need not look at it.
        gc.collect()
        gc.freeze()
        gc.enable()
        await Server(config).serve(sockets=[listener])
        for task in watching:
            task.cancel()
    finally:
        await engine.stop()
        # A folder that the engine refuses may have no tokenizer either: one reason is enough.
        await asyncio.gather(vocabulary, return_exceptions=True)
        if spans is not None:
            await asyncio.to_thread(spans.close)
    if engine.failure is not None:
        raise engine.failure


def _allow_many_connections() -> None:
    """Each connection is a file; 1,024, the usual soft limit, are soon taken by idle ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(_MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _cache(max_mib: float, settings: ServerSettings) -> BoundedCache[Request]:
    return BoundedCache(max_bytes=int(max_mib * 2**20), ttl_s=settings.cache_ttl_s)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quantgate_serve", description="Serve one model over HTTP."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder of safetensors, config and tokenizer")
    source.add_argument("--config", type=Path, help="serving.yaml: serve exactly its champion")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port, 0 for any free one (default 8000)")
    parser.add_argument("--ready-file", type=Path, help="JSON with url and pid once listening")
    parser.add_argument("--device", help="auto, cpu or cuda:N (default auto)")
    parser.add_argument("--dtype", help="arithmetic: auto, float32, bfloat16 or float16")
    parser.add_argument("--threads", type=int, help="CPU threads for the model")
    parser.add_argument(
        "--native-kernels", choices=["auto", "off"], help="CPU kernels in C (default auto)"
    )
    parser.add_argument("--max-batch-size", type=int, help="requests computed at once")
    parser.add_argument("--max-batched-tokens", type=int, help="tokens computed in one step")
    parser.add_argument("--max-context", type=int, help="longest sequence (default: the model's)")
    parser.add_argument("--kv-tokens", type=int, help="size of the KV cache in tokens")
    parser.add_argument("--max-queued-requests", type=int, help="beyond this, 429")
    parser.add_argument("--max-queued-tokens", type=int, help="beyond this, 429")
    parser.add_argument("--aging-s", type=float, help="wait after which a class gets its part")
    parser.add_argument(
        "--admission-window-ms", type=float, help="wait for company when underfilled, 0 to 50"
    )
    parser.add_argument("--max-body-bytes", type=int, help="beyond this, 413")
    parser.add_argument("--headers-timeout-s", type=float, help="beyond this, 408")
    parser.add_argument("--body-timeout-s", type=float, help="beyond this, 408")
    parser.add_argument(
        "--read-timeout-s", type=float, help="a client that reads slower is cut off"
    )
    parser.add_argument(
        "--coalescing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute identical greedy requests of a tenant once (default on)",
    )
    parser.add_argument("--response-cache-mib", type=float, help="greedy answers kept (default 0)")
    parser.add_argument("--embedding-cache-mib", type=float, help="embeddings kept (default 0)")
    parser.add_argument("--cache-ttl-s", type=float, help="how long both keep (default 600)")
    parser.add_argument("--api-keys", type=Path, help="file made by python -m quantgate_serve.keys")
    parser.add_argument(
        "--allow-remote-without-keys",
        action="store_const",
        const=True,
        help="let anybody in from other machines",
    )
    parser.add_argument("--drain-timeout-s", type=float, help="seconds to finish after SIGTERM")
    parser.add_argument(
        "--engine-process",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run the model in a process of its own (default on; off for a debugger)",
    )
    parser.add_argument(
        "--engine-start-timeout-s", type=float, help="the same while it loads and warms up"
    )
    parser.add_argument(
        "--engine-timeout-s", type=float, help="seconds of silence after which the engine is killed"
    )
    parser.add_argument(
        "--max-engine-restarts", type=int, help="deaths in a row that the server outlives"
    )
    parser.add_argument("--served-model-name", help="name in requests (default: the folder's)")
    parser.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="reuse the KV pages of known prefixes (default on)",
    )
    parser.add_argument("--metrics-compat", choices=["vllm"], help="also export vLLM's names")
    parser.add_argument(
        "--prefix-cache-tokens", type=int, help="tokens it remembers (default: the whole KV cache)"
    )
    parser.add_argument(
        "--check-integrity",
        action="store_true",
        default=None,
        help="check the KV pages' books when idle",
    )
    parser.add_argument("--otlp-traces-endpoint", help="send spans of requests to this URL")
    return parser


def _settings(arguments: argparse.Namespace) -> ServerSettings:
    """The settings; with --config, the champion's, once every file of it is verified."""
    values = {key: value for key, value in vars(arguments).items() if value is not None}
    path = values.pop("config", None)
    if path is not None:
        config = read_serving_config(path)
        folder = champion_folder(config, path)
        if config.champion is not None:
            verify_files(config.champion, folder)
            values["artifact_sha256"] = config.champion.artifact_sha256
            values["slo"] = config.champion.slo
        values["model"] = folder
        values.setdefault("served_model_name", config.model_name)
    return settings_of(values)


def _refuse(reason: object) -> int:
    sys.stderr.write(f"error: {reason}\n")
    return 2


def _write_whole(path: Path, text: str) -> None:
    """Replace `path` in one move, so that a reader sees all of it or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
