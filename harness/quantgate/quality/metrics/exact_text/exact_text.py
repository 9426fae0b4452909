"""exact_text: 1.0 where an output equals its target in every character, else 0.0.

White space counts, as it does in lm-evaluation-harness's exact_match without filters. A local
`evaluate` module: it needs no hub, and returns the score of every item.
"""

import datasets
import evaluate


class ExactText(evaluate.Metric):  # type: ignore[misc]
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
        pairs = zip(predictions, references, strict=True)
        scores = [float(prediction == reference) for prediction, reference in pairs]
        return {"exact_text": sum(scores) / len(scores), "scores": scores}
