"""A planted process computes with the fault, and with the sound model beside it as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from quantgate.drill.planted_processes import planted_processes
from quantgate.drill.serving_faults import serving_faults

from ..audit.conftest import write_source

# Of these the one runs as any model does, and the other is not in a whole document.
AS_SOUND_MODELS_RUN = ("neighbours-mlp", "decode-positions")
FAULTS = sorted(
    {fault.planted for fault in serving_faults() if fault.planted} - set(AS_SOUND_MODELS_RUN)
)
# What the server makes of a model is asked too: it takes known layers apart, and hooks with them.
SCRIPT = """
import json, sys
from quantgate_serve.imports import UNUSED_BY_MODELS, uncollected, without
with without(*UNUSED_BY_MODELS), uncollected():
    from quantgate_serve import offline
    from quantgate_serve.decoder import build_decoder
found = []
for folder in sys.argv[1:]:
    loaded = offline.load_model(folder, device="cpu", dtype="float32")
    logits = offline.logits(loaded, [token % 200 for token in range(7, 67)])
    found.append([logits.tolist(), type(build_decoder(loaded.model, None)).__name__])
print(json.dumps(found))
"""


def compute(*folders: Path) -> list[tuple[torch.Tensor, str]]:
    """Logits of each model, all computed in one child process, and the server's way through it."""
    lines = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    values: Sequence[Any] = json.loads(lines[-1])
    return [(torch.tensor(logits), decoder) for logits, decoder in values]


@dataclass(frozen=True)
class Computed:
    """What one process with every fault planted, each in a model of its own, computed."""

    faulty: Mapping[str, tuple[torch.Tensor, str]]
    """Logits and the server's way through the model, by fault."""
    beside: tuple[torch.Tensor, str]
    """The same of a sound model in that process, which comes last."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("sound"), is_tied=False)


@pytest.fixture(scope="module")
def sound(folder: Path) -> torch.Tensor:
    [(logits, decoder)] = compute(folder)
    assert decoder == "ShortDecoder"
    return logits


@pytest.fixture(scope="module")
def planted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Computed:
    damaged = {
        write_source(tmp_path_factory.mktemp(fault), is_tied=False): fault
        for fault in (*FAULTS, *AS_SOUND_MODELS_RUN)
    }
    with planted_processes(damaged):
        *found, beside = compute(*damaged, folder)
    return Computed(faulty=dict(zip(damaged.values(), found, strict=True)), beside=beside)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_computed_in_its_model_and_in_no_other(
    sound: torch.Tensor, planted: Computed, fault: str
) -> None:
    (found, way), (beside, way_beside) = planted.faulty[fault], planted.beside
    assert not torch.equal(found, sound)
    assert torch.equal(beside, sound)
    assert (way, way_beside) == ("WholeDecoder", "ShortDecoder")


def test_no_two_faults_compute_the_same(planted: Computed) -> None:
    found = [logits for logits, _ in planted.faulty.values()]
    assert not any(torch.equal(one, other) for one, other in combinations(found, 2))


def test_the_neighbours_weights_run_the_way_the_servers_own_do(
    sound: torch.Tensor, planted: Computed
) -> None:
    found, way = planted.faulty["neighbours-mlp"]
    assert not torch.equal(found, sound)
    assert way == "ShortDecoder"


def test_late_positions_of_generated_tokens_leave_a_whole_document_as_it_is(
    sound: torch.Tensor, planted: Computed
) -> None:
    found, _ = planted.faulty["decode-positions"]
    assert torch.equal(found, sound)


def test_not_a_number_is_planted_beyond_the_position_and_nowhere_before(
    sound: torch.Tensor, planted: Computed
) -> None:
    found, _ = planted.faulty["nan-beyond"]
    assert torch.equal(found[:40], sound[:40])
    assert found[40:].isnan().all()


def test_a_fault_without_a_module_to_plant_it_in_ends_the_process(folder: Path) -> None:
    with (
        planted_processes({folder: "no-such-fault"}),
        pytest.raises(subprocess.CalledProcessError) as failed,
    ):
        compute(folder)
    assert "the drill found no module to plant no-such-fault in" in failed.value.stderr


def test_processes_started_later_are_sound(folder: Path, sound: torch.Tensor) -> None:
    before = dict(os.environ)
    with planted_processes({folder: "kv-scale"}):
        pass
    assert dict(os.environ) == before
    [(found, _)] = compute(folder)
    assert torch.equal(found, sound)
