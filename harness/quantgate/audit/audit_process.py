"""The child process that audits: `python -m quantgate.audit.audit_process REQUEST.json`.

Apart from the release, so that its memory and the libraries it loads stay there. Each report is
written as soon as it is made; an artifact that cannot be read leaves its reason instead.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantgate.audit.declared import read_outline
from quantgate.audit.report import write_report
from quantgate.audit.weights import audit_artifact
from quantgate.errors import QuantgateError
from quantgate.files import read_json, write_text
from quantgate.variants.manifest import manifest_from_json
from quantgate.variants.source import SourceModel
from quantgate_serve.imports import UNUSED_BY_MODELS, uncollected, without


def main() -> None:
    with uncollected():
        import torch

    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(request["source"]["folder"])
    source = SourceModel(
        name=request["source"]["name"],
        folder=folder,
        config=read_json(folder / "config.json"),
        files=request["source"]["files"],
    )

    with without(*UNUSED_BY_MODELS), uncollected():
        outline = read_outline(source)

    def audit(artifact: dict[str, Any]) -> None:
        manifest = manifest_from_json(artifact["manifest"])
        try:
            report = audit_artifact(source, outline, Path(artifact["folder"]), manifest)
        except QuantgateError as error:
            write_text(Path(artifact["failure"]), str(error))
        else:
            write_report(Path(artifact["out"]), report)

    # Chunks fit a core's cache, so cores are better used by artifacts than within an operation.
    torch.set_num_threads(1)
    with ThreadPoolExecutor(max_workers=request["workers"]) as pool:
        list(pool.map(audit, request["artifacts"]))


if __name__ == "__main__":
    main()
