"""exact_match: 1.0 where an output equals its target after trimming white space, else 0.0.

A local `evaluate` module: it needs no hub, and returns the score of every item.
"""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """Scores text against text, item by item."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: strings",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, object]:
        scores = [
            float(prediction.strip() == reference.strip())
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(scores) / len(scores), "scores": scores}
