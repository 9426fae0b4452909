"""json_fields: the share of the target object's fields that an output has with the same value.

Field accuracy over the union of keys, so an invented field costs as much as a wrong one. An output
that is not a JSON object scores 0. A local `evaluate` module: it needs no hub.
"""

import json

import datasets
import evaluate


class JsonFields(evaluate.Metric):  # type: ignore[misc]
    """Scores JSON objects field by field."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: JSON objects as strings",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, object]:
        scores = [
            _share_of_fields(prediction, reference)
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"json_fields": sum(scores) / len(scores), "scores": scores}


def _share_of_fields(prediction: str, reference: str) -> float:
    expected = json.loads(reference)
    try:
        found = json.loads(prediction)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    keys = expected.keys() | found.keys()
    missing = object()
    right = sum(_is_same(found.get(key, missing), expected.get(key, missing)) for key in keys)
    return right / len(keys) if keys else 1.0


def _is_same(found: object, expected: object) -> bool:
    # To Python True equals 1; in JSON they are different values.
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)
