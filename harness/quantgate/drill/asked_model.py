"""One model behind one server: what it says of documents and of golden items, asked as needed.

The server is started when it is first asked something, and kept for what is asked after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from quantgate.drill.layers import scored_documents
from quantgate.errors import MeasurementError
from quantgate.measure import Measurement, Missing
from quantgate.plan import Plan
from quantgate.quality import noise_floor
from quantgate.quality.completions import FULL_BATCHES, Batching
from quantgate.quality.golden import GoldenSet
from quantgate.quality.served import measure_served, missing_served, reduce_served
from quantgate.quality.stage import QualityResult, ServedModel, measure_quality
from quantgate.server_pool import ServerPool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceDocuments:
    """What the reference's server said of the documents, and how far it is from itself."""

    said: Path | None
    """None where it said nothing."""
    noise: Sequence[Measurement]


class AskedModel:
    """A model's server; made by `asking`."""

    def __init__(
        self,
        plan: Plan,
        model: ServedModel,
        servers: ServerPool,
        *,
        store: Path,
        log: Path,
    ) -> None:
        self._plan = plan
        self._model = model
        self._servers = servers
        self._store = store
        self._log = log

    def answers(self, sets: Sequence[GoldenSet]) -> QualityResult:
        return measure_quality(
            self._model,
            sets,
            store=self._store,
            log=self._log,
            servers=self._servers,
            timeout_s=self._plan.timeout_s * 10,
            on_answers=lambda _: None,
        )

    def documents(
        self, reference: Path, *, offline: Path, beside: ReferenceDocuments, is_twice: bool
    ) -> list[Measurement]:
        """Served against offline, and the noise floor, which is the reference's.

        Args:
            reference: the folder whose tokenizer renders the documents.
            offline: the parquet of this model's offline scoring.
            is_twice: also ask in other batches, for the gate on how far it is from itself.
        """
        try:
            if not offline.is_file():
                raise MeasurementError("the model could not be scored offline")
            said = self._score(reference, FULL_BATCHES)
            again = self._score(reference, noise_floor.OTHER_BATCHES) if is_twice else None
            found = reduce_served(
                offline, said, reference=beside.said, again=again, source=said.name
            )
        except MeasurementError as error:
            found = missing_served(_last_line(error))
        return [*found, *beside.noise]

    def documents_twice(self) -> ReferenceDocuments:
        """Of the reference itself: the second time in other batches and another order."""
        said = None
        try:
            said = self._score(self._model.folder, FULL_BATCHES)
            again = self._score(self._model.folder, noise_floor.OTHER_BATCHES)
            rerun = noise_floor.Rerun(first=said, second=again)
            noise = noise_floor.reduce_noise(rerun, source=again.name)
        except MeasurementError as error:
            reason = f"the reference: {_last_line(error)}"
            noise = [Missing(metric=metric, reason=reason) for metric in noise_floor.METRICS]
        return ReferenceDocuments(said=said, noise=noise)

    def _score(self, reference: Path, batching: Batching) -> Path:
        documents, max_tokens = scored_documents(self._plan, reference)
        return measure_served(
            self._model,
            documents,
            max_tokens=max_tokens,
            store=self._store,
            log=self._log,
            servers=self._servers,
            timeout_s=self._plan.timeout_s * 10,
            on_answers=lambda _: None,
            batching=batching,
        )


@contextmanager
def asking(
    plan: Plan,
    model: ServedModel,
    *,
    store: Path,
    log: Path,
    options: Mapping[str, int] | None = None,
) -> Iterator[AskedModel]:
    """A model to ask; its server ends with the block.

    Args:
        store: where its results are kept, and found again.
        options: server options that differ from the policy's.
    """
    store.mkdir(parents=True, exist_ok=True)
    server = replace(plan.server, **(options or {}))  # type: ignore[arg-type]
    with ServerPool(server, keeps_running=True) as servers:
        yield AskedModel(plan, model, servers, store=store, log=log)


def _last_line(error: MeasurementError) -> str:
    return str(error).splitlines()[-1].strip()
