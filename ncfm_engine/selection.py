"""Which real images stand for a class: picked by the features of a trained network.

Both take features [N, D] of one class and return int64 [count] rows of it, the most telling ones first. A
class with fewer images than that gives each of them before any one twice.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from distilled_data import MissingExtraError


def herding(features: Tensor, count: int) -> Tensor:
    """Rows whose mean follows the mean of all as closely as can be at every length (Welling 2009).

    Greedy, as in iCaRL (Rebuffi et al. 2017, arXiv 1611.07725), so that `herding(x, n)[:k]` is
    `herding(x, k)`.
    """
    features = features.double()
    mean = features.mean(0)
    free = torch.ones(len(features), dtype=torch.bool)
    total, chosen = torch.zeros_like(mean), []
    for number in range(1, min(count, len(features)) + 1):
        distance = (mean - (total + features) / number).square().sum(1)
        row = int(distance.masked_fill(~free, torch.inf).argmin())
        chosen.append(row)
        free[row] = False
        total += features[row]
    return _repeated(torch.tensor(chosen), count)


def clusters(features: Tensor, count: int, seed: int) -> Tensor:
    """The rows nearest to the centres of `count` clusters, those of the largest clusters first.

    k-means of scikit-learn, as DREAM (arXiv 2302.14416) chooses its real images. Raises `MissingExtraError`.
    """
    with MissingExtraError.unless("scikit-learn", "data", "distill.initialisation=clusters"):
        from sklearn.cluster import k_means
    rows = features.numpy()
    distinct = len({row.tobytes() for row in rows})  # equal ones can be in one cluster only
    with warnings.catch_warnings():  # clusters of images that are equal but for rounding may be empty
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        centres, labels = k_means(rows, min(count, distinct), random_state=seed % 2**32)[:2]
    labels = np.asarray(labels)
    distance = np.linalg.norm(rows - centres[labels], axis=1)
    sizes = np.bincount(labels)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    return _repeated(torch.tensor([np.where(labels == k, distance, np.inf).argmin() for k in order]), count)


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows[torch.arange(count) % len(rows)]
