"""Whether answers grew or shrank as a whole: tokens of the candidate's over the reference's.

One answer may well be longer than the reference's; that all of them are 10 % longer is a fault of
an end token or a template, and costs throughput. So a set is judged, by clusters, not an item.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantgate.measure import ClusteredRatio, Measurement, Missing

STATISTIC = "output_tokens.ratio"


def length_ratio(
    metric: str,
    reference: Sequence[int],
    candidate: Sequence[int],
    clusters: Sequence[str],
    *,
    source: str,
) -> Measurement:
    """Tokens per answer, both arms in the same order, summed by cluster.

    An answer without tokens counts as none: an item that failed makes the candidate's shorter.
    """
    if not any(reference):
        reason = "the reference generated no token, so nothing is relative to it"
        return Missing(metric=metric, reason=reason, source=source)
    _, index = np.unique(clusters, return_inverse=True)
    return ClusteredRatio(
        metric=metric,
        baseline=tuple(np.bincount(index, weights=reference)),
        candidate=tuple(np.bincount(index, weights=candidate)),
        source=source,
    )
