"""token_f1: SQuAD's F1 of an answer's words and the target's, after its normalisation.

Lower case, without ASCII punctuation and the articles a, an, the, split at white space; texts are
composed (NFC) first, so that the two ways to write an accent are one. Words count as often as they
occur in both. A local `evaluate` module: it needs no hub, and returns the score of every item.

Source: Rajpurkar et al., SQuAD, EMNLP 2016, 6.1, and its evaluate-v1.1.py.
"""

import re
import string
import unicodedata
from collections import Counter

import datasets
import evaluate

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class TokenF1(evaluate.Metric):  # type: ignore[misc]
    """Scores short answers by the words they share with the target."""

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
            _f1(_words(prediction), _words(reference))
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"token_f1": sum(scores) / len(scores), "scores": scores}


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFC", text).lower().translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


def _f1(prediction: list[str], reference: list[str]) -> float:
    shared = (Counter(prediction) & Counter(reference)).total()
    if not shared:
        # Two texts that are nothing but articles and punctuation are the same answer.
        return float(prediction == reference)
    # The harmonic mean of shared / prediction and shared / reference.
    return 2 * shared / (len(prediction) + len(reference))
