"""rouge1, rouge2, rougeL: the F-measure of shared words, shared pairs, or the longest shared order.

Computed by rouge-score, the package that the hub's module wraps, without stemming and on words in
any script (`words.py`). The name of the score is the module's configuration. A local `evaluate`
module: it needs no hub, and returns the score of every item.

Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries, Text Summarization Branches Out
(ACL 2004), 2 and 3.1.
"""

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

from quantgate.quality.words import words_of


class _Words:
    """What rouge-score asks for words."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """Scores text against text by the words they share."""

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
        scorer = RougeScorer([self.config_name], tokenizer=_Words())
        scores = [
            float(scorer.score(reference, prediction)[self.config_name].fmeasure)
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {self.config_name: sum(scores) / len(scores), "scores": scores}
