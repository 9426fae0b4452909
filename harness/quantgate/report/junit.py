"""JUnit XML of a release for CI systems that do not run `pytest gates/`: a case per variant × gate.

FAIL and INCONCLUSIVE are failures, INVALID is an error, and a variant whose set of verdicts is not
the required one gets an error of its own. Nothing is ever reported as skipped.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from quantgate.verdict import Decision, Outcome, Verdict


def junit_xml(decisions: Sequence[Decision], *, name: str) -> str:
    """The document as text; `name` is the release id."""
    root = ET.Element("testsuites", name="quantgate")
    for decision in decisions:
        suite = ET.SubElement(root, "testsuite", name=f"{name}.{decision.variant}")
        for verdict in decision.verdicts:
            _add_case(suite, verdict)
        problems = decision.problems or (() if decision.verdicts else ("no verdicts",))
        if problems:
            case = ET.SubElement(suite, "testcase", classname=decision.variant, name="decision")
            ET.SubElement(case, "error", message="; ".join(problems))
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
        suite.set("errors", str(len(suite.findall("testcase/error"))))
        suite.set("skipped", "0")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def properties(verdict: Verdict) -> list[tuple[str, str]]:
    """What a CI system may show next to a test case; the pytest plugin attaches the same."""
    written = [
        ("outcome", str(verdict.outcome)),
        ("metric", verdict.metric),
        ("measured", verdict.observed()),
        ("limit", verdict.allowed()),
        ("ci", verdict.bounds()),
        ("confidence", f"{verdict.confidence:g}"),
        ("n", str(verdict.n)),
        ("baseline", verdict.baseline or ""),
        ("source", verdict.source or ""),
    ]
    return [(name, value) for name, value in written if value]


def _add_case(suite: ET.Element, verdict: Verdict) -> None:
    case = ET.SubElement(suite, "testcase", classname=verdict.variant, name=verdict.gate_id)
    listed = ET.SubElement(case, "properties")
    for name, value in properties(verdict):
        ET.SubElement(listed, "property", name=name, value=value)
    if verdict.outcome is Outcome.INVALID:
        ET.SubElement(case, "error", message=verdict.line())
    elif verdict.outcome is not Outcome.PASS:
        ET.SubElement(case, "failure", message=verdict.line(), type=str(verdict.outcome))
