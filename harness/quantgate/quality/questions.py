"""What each model of a release is asked through its server: golden sets, and documents to score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from quantgate.errors import UsageError
from quantgate.files import write_bytes
from quantgate.plan import Plan
from quantgate.progress import Progress
from quantgate.quality import served
from quantgate.quality.completions import Batching
from quantgate.quality.early_stop import StopRule
from quantgate.quality.golden import GoldenSet
from quantgate.quality.rendering import RenderedPrompt, Renderer
from quantgate.quality.stage import QualityResult, ServedModel, measure_quality
from quantgate.release_folder import ReleaseFolder, store_of
from quantgate.server_pool import ServerPool

# Of text in most languages.
_CHARACTERS_A_TOKEN = 4
# A golden set or all documents are one question, of many requests.
_TIMEOUTS_A_QUESTION = 10


class Questions:
    """Asked one model at a time; answers are stored under the runs, and found there again."""

    def __init__(
        self,
        plan: Plan,
        release: ReleaseFolder,
        servers: ServerPool,
        progress: Progress,
        *,
        tokenizer: Path,
    ) -> None:
        """`tokenizer` is the folder of the model whose tokens the documents become.

        Raises:
            UsageError: there are documents, and none of them has two tokens.
        """
        self._plan = plan
        self._release = release
        self._servers = servers
        self._progress = progress
        self.store = store_of(plan.runs) / "results"
        self.store.mkdir(parents=True, exist_ok=True)
        self.max_tokens = plan.policy.distribution.max_tokens if plan.policy.distribution else 0
        self.documents = self._render_documents(tokenizer)

    @property
    def num_asked(self) -> int:
        """Items and documents that one model is asked."""
        return sum(len(golden.items) for golden in self._plan.golden_sets) + len(self.documents)

    @property
    def sets_together(self) -> list[tuple[GoldenSet, ...]]:
        """What is asked in one piece; the largest first, so that the pieces at the end are short.

        One after the other where two models are asked at a time, and so all servers kept. Else all
        of them: for each piece the server would be started anew.
        """
        sets = self._plan.golden_sets
        if self._plan.models_together == 1:
            return [sets] if sets else []
        return sorted(((golden,) for golden in sets), key=size_of, reverse=True)

    @cached_property
    def size_of_documents(self) -> float:
        """In tokens, as `size_of` is."""
        return sum(min(len(one.ids), self.max_tokens) for one in self.documents)

    def ask_golden(
        self,
        model: ServedModel,
        batching: Batching,
        sets: tuple[GoldenSet, ...],
        rules: Mapping[str, StopRule] | None = None,
    ) -> QualityResult:
        """The answers to `sets`; a set that could not be asked has its reason."""
        return measure_quality(
            model,
            sets,
            store=self.store,
            log=self._release.log(model.name),
            servers=self._servers,
            timeout_s=self._plan.timeout_s * _TIMEOUTS_A_QUESTION,
            on_answers=self._counting(model.name),
            batching=batching,
            stop_rules=rules,
        )

    def ask_documents(self, model: ServedModel, batching: Batching, out: Path) -> None:
        """Writes scored tokens to `out`.

        Raises:
            MeasurementError: the server does not score them.
        """
        path = served.measure_served(
            model,
            self.documents,
            max_tokens=self.max_tokens,
            store=self.store,
            log=self._release.log(model.name),
            servers=self._servers,
            timeout_s=self._plan.timeout_s * _TIMEOUTS_A_QUESTION,
            on_answers=self._counting(model.name),
            batching=batching,
        )
        write_bytes(out, path.read_bytes())

    def _counting(self, name: str) -> Callable[[int], None]:
        return lambda count: self._progress.step(count, name)

    def _render_documents(self, tokenizer: Path) -> list[RenderedPrompt]:
        """Those with a token to predict."""
        if self._plan.documents is None:
            return []
        rendered = Renderer(tokenizer).render(self._plan.documents)
        usable = [one for one in rendered if min(len(one.ids), self.max_tokens) >= 2]
        if not usable:
            raise UsageError("distribution: no document has two tokens, so nothing is compared.")
        return usable


def size_of(sets: tuple[GoldenSet, ...]) -> float:
    """About how many tokens are computed; only the order of pieces depends on it."""
    num_characters = sum(
        len(item.text or "") + sum(len(message["content"]) for message in item.messages or ())
        for golden in sets
        for item in golden.items
    )
    num_answered = sum(
        len(golden.items) * golden.task.generation_kwargs.max_gen_toks
        for golden in sets
        if golden.task.output_type == "generate_until"
    )
    return num_characters / _CHARACTERS_A_TOKEN + num_answered
