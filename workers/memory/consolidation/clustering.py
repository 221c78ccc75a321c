"""
The program that clusters vectors: it reads groups of them from its input, and writes the clusters of each.

HDBSCAN is given vectors of length 1, whose Euclidean distance orders as their cosine does. It needs no number of
clusters, and what belongs to none stays outside. This program is the only one that imports scikit-learn: it ends
afterwards, and so does the memory that it needs.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

#: Least mean cosine of a vector with the others of its cluster.
LEAST_NEAR = 0.35
#: Mean cosine of the vectors of two clusters with each other from which on they are one.
SAME_CLUSTER = 0.5


def clusters_of(vectors: Any, smallest: int) -> list[list[int]]:
    """
    Return the clusters of vectors, the largest first: their indexes, those nearest to the middle first.

    `smallest` is the fewest vectors of a cluster.
    """
    import numpy as np
    from sklearn.cluster import HDBSCAN

    given = np.asarray(vectors, dtype=np.float64)
    given /= np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-9)
    # `leaf` finds the small dense clusters; the default prefers a few large ones, whose turns have little in common.
    found = HDBSCAN(
        min_cluster_size=max(smallest, 2),
        min_samples=min(2, len(given)),
        cluster_selection_method="leaf",
        allow_single_cluster=False,
        n_jobs=1,
        copy=True,
    ).fit(given)
    labels = found.labels_
    if labels.max() < 0:
        labels = _as_one(given, smallest)
    clusters = []
    for members in _joined(given, [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]):
        near = _nearness(given[members])
        order = [int(members[index]) for index in np.argsort(-near, kind="stable") if near[index] >= LEAST_NEAR]
        if len(order) >= smallest:
            clusters.append(order)
    return sorted(clusters, key=lambda members: (-len(members), members[0]))


def _as_one(given: Any, smallest: int) -> Any:
    """HDBSCAN finds no cluster where there is only one: all vectors are tried as one, without those far from it."""
    import numpy as np

    inside = np.full(len(given), True)
    for _ in range(3):
        if inside.sum() < max(smallest, len(given) // 2):
            return np.full(len(given), -1)
        members = np.flatnonzero(inside)
        inside[members] = _nearness(given[members]) >= LEAST_NEAR
    return np.where(inside, 0, -1)


def _joined(given: Any, parts: list[Any]) -> list[Any]:
    """Join the clusters that are near each other, the nearest first: the same thing in other words is one cluster."""
    import numpy as np

    while len(parts) > 1:
        middles = np.stack([given[members].mean(axis=0) for members in parts])
        near = middles @ middles.T
        np.fill_diagonal(near, -1)
        one, other = np.unravel_index(int(near.argmax()), near.shape)
        if near[one, other] < SAME_CLUSTER:
            break
        parts[one] = np.concatenate([parts[one], parts[other]])
        del parts[other]
    return parts


def _nearness(given: Any) -> Any:
    """Return the mean cosine of each vector with the others."""
    return (given @ given.sum(axis=0) - 1) / max(len(given) - 1, 1)


def main() -> None:
    """Read one request, and write its answer. It takes what others leave, and one core at most."""
    from threadpoolctl import threadpool_limits

    os.nice(10)
    request = json.load(sys.stdin)
    smallest = int(request["smallest"])
    with threadpool_limits(1):
        json.dump([clusters_of(group, smallest) for group in request["groups"]], sys.stdout)


if __name__ == "__main__":
    main()
