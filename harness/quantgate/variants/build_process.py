"""The child process that builds one variant: `python -m quantgate.variants.build_process FILE`."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from quantgate.files import write_json
from quantgate.variants.scheme import BuildRequest
from quantgate.variants.source import DEMO_MODEL, demo_folder, open_source
from quantgate_serve.imports import uncollected

_MODULES = {
    "bf16": "quantgate.variants.bf16",
    "int8-bnb": "quantgate.variants.int8_bnb",
    "int4-nf4": "quantgate.variants.int4_nf4",
    "int8-gptq": "quantgate.variants.gptq",
    "int4-gptq": "quantgate.variants.gptq",
}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(request["source"])
    source = open_source(DEMO_MODEL if folder == demo_folder() else str(folder))
    with uncollected():
        scheme = importlib.import_module(_MODULES[request["scheme"]])
    notes = scheme.build(
        source,
        Path(request["out"]),
        BuildRequest(
            scheme=request["scheme"],
            options=request["options"],
            device=request["device"],
            calibration_ids=request["calibration_ids"],
        ),
    )
    write_json(Path(request["notes"]), asdict(notes)["notes"])


if __name__ == "__main__":
    main()
