"""The audit as a child process: stored by digest, and a bad artifact does not take others along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantgate.audit.judgement import judge_audits
from quantgate.audit.report import read_report
from quantgate.audit.stage import audit_variants
from quantgate.policy import load_policy
from quantgate.variants.build import Variant
from quantgate.variants.source import SourceModel
from quantgate.verdict import Outcome

from .conftest import Artifact

POLICY = """
policy: audited
model: demo
variants: {good: {scheme: int8-bnb}, bad: {scheme: bf16}, other: {scheme: int4-nf4}}
champion: bad
gates:
  - {id: weights, metric: audit/weight_error.ratio, test: limit, max: 1.4 x, variants: [good, bad]}
  - {id: oom, metric: memory/peak_bytes.max, test: limit, max: 1 GiB}
"""


def variant(artifact: Artifact, name: str) -> Variant:
    return Variant(name=name, folder=artifact.folder, manifest=artifact.manifest)


def test_a_bad_artifact_has_a_reason_and_the_good_one_a_report(
    untied_source: SourceModel, build: Callable[..., Artifact], tmp_path: Path
) -> None:
    good, bad = build(untied_source, "int8-bnb"), build(untied_source, "bf16")
    (bad.folder / "config.json").write_text("{", encoding="utf-8")
    done: list[str] = []
    variants = {"good": variant(good, "good"), "bad": variant(bad, "bad")}
    result = audit_variants(
        untied_source, variants, store=tmp_path / "store", log=tmp_path / "audit.log",
        on_done=done.append,
    )  # fmt: skip
    assert done == ["good", "bad failed"]
    assert read_report(result.reports["good"]).coverage == ()
    assert "config.json: cannot be read" in result.failures["bad"]
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    judged = {one.variant: one for one in judge_audits(load_policy(path), result)}
    assert [v.outcome for v in judged["good"].verdicts] == [Outcome.PASS]
    [verdict] = judged["bad"].verdicts
    assert verdict.outcome is Outcome.INVALID
    assert "config.json: cannot be read" in verdict.reason
    assert verdict.baseline == "source"

    # The same bytes are not read twice; a report of another version is made again.
    done.clear()
    del variants["bad"]
    again = audit_variants(
        untied_source, variants, store=tmp_path / "store", log=tmp_path / "none.log",
        on_done=done.append,
    )  # fmt: skip
    assert (done, again.reports) == (["good reused"], {"good": result.reports["good"]})
    assert not (tmp_path / "none.log").exists()


def test_an_audit_that_dies_says_so(
    untied_source: SourceModel, build: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = build(untied_source, "bf16")
    # A store that is a file: the child cannot write its report.
    store = tmp_path / "store"
    broken = variant(artifact, "v")
    missing = SourceModel(
        name="gone", folder=tmp_path / "gone", config={}, files=dict(untied_source.files)
    )
    result = audit_variants(
        missing, {"v": broken}, store=store, log=tmp_path / "audit.log", on_done=lambda _: None
    )
    assert result.reports == {}
    assert result.failures["v"].startswith("the audit ended (exit code 1) with: FileNotFoundError")


@pytest.mark.parametrize("metric", ["audit/weight_error.ratio", "audit/weight_bits.mean"])
def test_an_audit_metric_has_no_sampling_error_so_only_a_limit_judges_it(
    tmp_path: Path, metric: str
) -> None:
    path = tmp_path / "policy.yaml"
    gate = f"  - {{id: x, metric: {metric}, test: mean, max: 1 x}}\n"
    path.write_text(POLICY + gate, encoding="utf-8")
    with pytest.raises(Exception, match=f"does not suit {metric}; write: test: limit"):
        load_policy(path)
