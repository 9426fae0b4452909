"""The audit stage: one child process for all artifacts that the store has no audit of."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from quantgate.audit.report import read_report
from quantgate.errors import MeasurementError
from quantgate.files import sha256_of_file, sha256_of_json, write_json
from quantgate.server import last_lines
from quantgate.variants.build import Variant
from quantgate.variants.source import SourceModel

_MAX_WORKERS = 4
"""Each holds the largest quantized tensor of the artifact that it audits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """Where each artifact's audit.json lies in the store, or why there is none."""

    reports: Mapping[str, Path]
    failures: Mapping[str, str]


def audit_variants(
    source: SourceModel,
    variants: Mapping[str, Variant],
    *,
    store: Path,
    log: Path,
    on_done: Callable[[str], None],
) -> AuditResult:
    """Audits each artifact against the source; nothing is raised for one that cannot be read."""
    store.mkdir(parents=True, exist_ok=True)
    paths = {name: store / f"audit-{_key(source, v)[:24]}.json" for name, v in variants.items()}
    wanted = {name: variants[name] for name, path in paths.items() if not _has_report(path)}
    for name in variants:
        if name not in wanted:
            on_done(f"{name} reused")
    failures = _run(source, wanted, paths, log=log) if wanted else {}
    for name in wanted:
        on_done(f"{name} failed" if name in failures else name)
    return AuditResult(
        reports={name: path for name, path in paths.items() if name not in failures},
        failures=failures,
    )


def _run(
    source: SourceModel, wanted: Mapping[str, Variant], paths: Mapping[str, Path], *, log: Path
) -> dict[str, str]:
    """Returns the reason for each artifact without a report."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantgate-") as temporary:
        failed = {name: Path(temporary) / f"{index}.txt" for index, name in enumerate(wanted)}
        request = Path(temporary) / "request.json"
        write_json(
            request,
            {
                "source": {
                    "name": source.name,
                    "folder": str(source.folder.resolve()),
                    "files": dict(source.files),
                },
                "workers": min(os.cpu_count() or 1, _MAX_WORKERS),
                "artifacts": [
                    {
                        "folder": str(variant.folder.resolve()),
                        "manifest": asdict(variant.manifest),
                        "out": str(paths[name].resolve()),
                        "failure": str(failed[name]),
                    }
                    for name, variant in wanted.items()
                ],
            },
        )
        with log.open("wb") as file:
            code = subprocess.run(
                [sys.executable, "-m", "quantgate.audit.audit_process", str(request)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                check=False,
            ).returncode
        reasons = {n: p.read_text(encoding="utf-8") for n, p in failed.items() if p.is_file()}
    last = last_lines(log).splitlines()[-1].strip()
    ended = f"the audit ended (exit code {code}) with: {last} (all of it: {log})"
    return {n: reasons.get(n, ended) for n in wanted if not paths[n].is_file()}


def _key(source: SourceModel, variant: Variant) -> str:
    """An audit is found by what it depends on, never by a name."""
    return sha256_of_json(
        {
            "manifest": asdict(variant.manifest),
            "source": source.sha256,
            "audit": _audit_sha256(),
        }
    )


@cache
def _audit_sha256() -> str:
    """The version of the audit: the digest of its code."""
    root = Path(str(resources.files("quantgate") / "audit"))
    return sha256_of_json({p.name: sha256_of_file(p) for p in sorted(root.glob("*.py"))})


def _has_report(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_report(path)
    except MeasurementError:
        # Left by another version, or cut short: made again.
        path.unlink()
        return False
    return True
