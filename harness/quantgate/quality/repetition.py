"""Repeated n-grams: a model in a loop says the same tokens again and again."""

from __future__ import annotations

from collections.abc import Sequence


def share_repeated(token_ids: Sequence[int], ngram: int) -> float:
    """The share of an output's n-grams that stood in it before, 0 to 1.

    One less distinct-n (Li et al., A Diversity-Promoting Objective Function for Neural Conversation
    Models, NAACL 2016, 5), over tokens: they need no spaces between words. An output shorter than
    one n-gram repeats nothing.
    """
    total = len(token_ids) - ngram + 1
    if total <= 0:
        return 0.0
    different = {tuple(token_ids[at : at + ngram]) for at in range(total)}
    return (total - len(different)) / total
