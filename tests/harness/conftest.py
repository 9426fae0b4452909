"""A small policy; and a real release in miniature, measured once per session: the demo model, few
items."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantgate.plan import ReleaseRequest
from quantgate.policy import Policy, load_policy
from quantgate.progress import Silent
from quantgate.quality.golden import load_golden_set
from quantgate.quality.lock import write_lock
from quantgate.quality.rendering import Renderer
from quantgate.record import record_release
from quantgate.release import ReleaseResult, judge_stored, measure_release
from quantgate.spec import SpecError
from quantgate.variants.source import demo_folder

ROOT = Path(__file__).resolve().parents[2]

POLICY = """
policy: mini.cpu
model: order-desk
device: cpu
reference: source
champion: bf16
variants:
  bf16: {scheme: bf16}
  int4-nf4: {scheme: int4-nf4}
golden_sets: [order-total, order-route]
distribution: {golden_set: order-prose, max_tokens: 64}
workload:
  seed: 1
  burst_requests: 4
  rate: 20 req/s
  requests: 8
  prompt_tokens: [8, 16]
  output_tokens: [2, 4]
  warmup_requests: 1
  blocks: 4
serving: {max_batch_size: 8, max_batched_tokens: 256, kv_tokens: 4096, threads: 1, timeout: 60 s}
gates:
  - {id: weights, metric: audit/weight_error.ratio, test: limit, max: 1.4 x}
  - {id: route, metric: quality/order-route.exact_match, test: non_inferiority, margin: 60 pt}
  - {id: total-finished, metric: validity/order-total.finished, test: rate, max: 99 %}
  - {id: kl, metric: quality/kl_nats.mean, test: mean, max: 0.0005 nats}
  - {id: memory, metric: memory/peak_bytes.max, test: limit, max: 4 GiB}
  - {id: oom, metric: stability/oom.count, test: limit, max: 0 count}
  - {id: errors, metric: stability/error.rate, test: rate, max: 20 %}
"""


SMALL_POLICY = """\
policy: small
model: demo
variants:
  bf16: {scheme: bf16}
  int4: {scheme: int4-gptq, group_size: 128}
calibration: {path: text}
golden_sets: [golden_sets/orders]
distribution: {golden_set: prose}
workload:
  seed: 7
  burst_requests: 32
  rate: 20 req/s
  requests: 40
  prompt_tokens: [32, 256]
  output_tokens: [16, 64]
gates:
  - {id: orders, metric: quality/orders.exact_match, test: non_inferiority, margin: 2 pt}
  - {id: kl, metric: quality/kl_nats.mean, test: mean, max: 0.06 nats, schemes: [int4-gptq]}
  - {id: speed, metric: perf/output_tok_per_s.ratio, test: ratio, min: 0.95 x,
     variants: [int4], confidence: 0.99}
  - {id: oom, metric: stability/oom.count, test: limit, max: 0 count}
"""


@dataclass(frozen=True)
class SmallPolicy:
    """A policy file of one gate of each kind, which loads, and what becomes of it when changed."""

    path: Path
    text: str = SMALL_POLICY

    def load(self, text: str = SMALL_POLICY) -> Policy:
        self.path.write_text(text, encoding="utf-8")
        return load_policy(self.path)

    def refusal(self, text: str) -> str:
        """Every line of the refusal, with file names instead of paths."""
        with pytest.raises(SpecError) as caught:
            self.load(text)
        return str(caught.value).replace(f"{self.path.parent}/", "")

    def replaced(self, old: str, new: str) -> str:
        if old not in self.text:
            raise ValueError(f"{old!r} is not in the small policy")
        return self.text.replace(old, new, 1)


@pytest.fixture
def small_policy(tmp_path: Path) -> SmallPolicy:
    return SmallPolicy(tmp_path / "small.yaml")


def write_mini_set(name: str, folder: Path, *, model: Path, num_items: int) -> Path:
    """The first items of one of the project's golden sets, locked for the demo model."""
    source = ROOT / "golden_sets" / name
    target = folder / name
    target.mkdir(parents=True)
    shutil.copyfile(source / "task.yaml", target / "task.yaml")
    lines = (source / "items.jsonl").read_text(encoding="utf-8").split("\n")[:num_items]
    (target / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    golden = load_golden_set(target)
    renderer = Renderer(model)
    write_lock(golden, renderer.describe(golden, renderer.render(golden)), model="demo")
    return target


@dataclass(frozen=True)
class MiniProject:
    """A working folder as a user has one."""

    root: Path

    @property
    def policy(self) -> Path:
        return self.root / "gates" / "policies" / "mini.cpu.yaml"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def serving_config(self) -> Path:
        return self.root / "serve" / "serving.yaml"

    def request(self) -> ReleaseRequest:
        return ReleaseRequest(
            policy=load_policy(self.policy), runs=self.runs, serving_config=self.serving_config
        )


@pytest.fixture(scope="session")
def mini_project(tmp_path_factory: pytest.TempPathFactory) -> MiniProject:
    project = MiniProject(tmp_path_factory.mktemp("project"))
    project.policy.parent.mkdir(parents=True)
    project.policy.write_text(POLICY, encoding="utf-8")
    # A copy, so that training a new demo model meanwhile changes nothing here.
    shutil.copytree(demo_folder(), project.root / "order-desk")
    for name, num_items in (("order-total", 6), ("order-route", 12), ("order-prose", 40)):
        write_mini_set(
            name,
            project.root / "golden_sets",
            model=project.root / "order-desk",
            num_items=num_items,
        )
    return project


@pytest.fixture(scope="session")
def mini_release(mini_project: MiniProject) -> ReleaseResult:
    """Measured, judged and recorded; tests that change it work on a copy."""
    release = measure_release(mini_project.request(), Silent())
    result = judge_stored(release)
    record_release(release)
    return result


@pytest.fixture
def release_copy(
    mini_project: MiniProject, mini_release: ReleaseResult, tmp_path: Path
) -> MiniProject:
    """A copy of the project after its release, free to be damaged."""
    root = tmp_path / "project"
    shutil.copytree(mini_project.root, root)
    return MiniProject(root)


def edit_json(path: Path, **changes: object) -> None:
    """Changes keys of a JSON file by hand, as somebody who wants a PASS might."""
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | changes), encoding="utf-8")


@pytest.fixture(scope="session")
def add_mini_set() -> Callable[..., Path]:
    return write_mini_set
