"""What the scheduler itself costs, and how its pages lie, without a model.

    python benchmarks/scheduler.py [--seconds S] [--json FILE]

A step is schedule(), then a commit and a token for each chunk, as the engine does it, with requests
ending and others taking their place. Thread time, so that a busy machine does not count.

Of the pages that decodes read after another page of their sequence, a share lies right behind it:
over the workloads of `serving.py`, once as they are and once ten times as long, the first quarter
of the requests left out.
"""

import argparse
import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from time import thread_time
from typing import Any

from machine import describe_machine
from serving_workload import BenchRequest, workload_a, workload_b

from quantgate_serve.kv.pool import PagePool
from quantgate_serve.kv.prefix import PrefixCache
from quantgate_serve.request import FinishReason, Priority, Request, SamplingParams
from quantgate_serve.scheduler import Scheduler, SchedulerLimits

SIZES = (1, 16, 64, 128, 256)
_PROMPT, _OUTPUT = 40, 64
_SEATS, _PAGES = 64, 2048


def measure(size: int, *, queued: int, tenants: int, seconds: float) -> float:
    """Microseconds per step with `size` running and `queued` waiting, of so many tenants."""
    source = random.Random(size)
    pool = PagePool(size * 12)
    scheduler = Scheduler(
        pool, SchedulerLimits(size, max(512, 2 * size)), prefix_cache=PrefixCache(pool)
    )

    def add() -> None:
        tenant = f"t{source.randrange(tenants)}"
        scheduler.add(
            Request(
                [source.randrange(2, 4096) for _ in range(_PROMPT)],
                SamplingParams(max_tokens=source.randint(1, 2 * _OUTPUT)),
                tenant=tenant,
                cache_root=tenant,
                # One class: a more urgent one would rightly take the seats of the others.
                priority=Priority.NORMAL,
            )
        )

    for _ in range(size + queued):
        add()
    spent, steps = 0.0, 0
    while spent < seconds:
        started = thread_time()
        plan = scheduler.schedule()
        ended: list[Request] = []
        for chunk in plan:
            request, is_last = chunk.request, chunk.is_last
            scheduler.commit(chunk)
            if is_last:
                request.token_ids.append(5)
                if len(request.token_ids) - _PROMPT >= request.params.max_tokens:
                    ended.append(request)
        for request in ended:
            scheduler.finish(request, FinishReason.LENGTH)
        spent += thread_time() - started
        steps += 1
        for _ in ended:
            add()
    return 1e6 * spent / steps


def share_of_neighbours(work: list[BenchRequest], *, cached: bool, skipped: int) -> float:
    """The share, from when `skipped` requests have ended; 64 seats on 2,048 pages."""
    pool = PagePool(_PAGES)
    scheduler = Scheduler(
        pool, SchedulerLimits(_SEATS, 512), prefix_cache=PrefixCache(pool) if cached else None
    )
    for wanted in work:
        scheduler.add(Request(wanted.prompt, SamplingParams(max_tokens=wanted.num_output)))
    neighbours = read = ended = 0
    while scheduler.has_work:
        for chunk in scheduler.schedule():
            request, is_last = chunk.request, chunk.is_last
            if request.num_output and ended >= skipped:
                pages = request.pages
                read += len(pages) - 1
                neighbours += sum(b == a + 1 for a, b in pairwise(pages))
            scheduler.commit(chunk)
            if is_last:
                request.token_ids.append(5)
                if request.num_output >= request.params.max_tokens:
                    scheduler.finish(request, FinishReason.LENGTH)
                    ended += 1
    return neighbours / read


def main(argv: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each size")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        row = {"running": size}
        for queued, tenants in ((8, 1), (1000, 1), (1000, 100)):
            found = measure(size, queued=queued, tenants=tenants, seconds=arguments.seconds)
            row[f"us_{queued}_queued_{tenants}_tenants"] = round(found, 1)
        rows.append(row)
        print(row)
    shares: dict[str, float] = {}
    for name, work, count in (("A", workload_a, 256), ("B", workload_b, 192)):
        for cached in (False, True):
            kind = f"{name}, {'prefix cache' if cached else 'no prefix cache'}"
            share = share_of_neighbours(work(count), cached=cached, skipped=0)
            later = share_of_neighbours(work(10 * count), cached=cached, skipped=10 * count // 4)
            shares[kind], shares[f"{kind}, ten times"] = round(share, 3), round(later, 3)
    print({"neighbours": shares})
    report = {"machine": describe_machine(), "rows": rows, "neighbours": shares}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
