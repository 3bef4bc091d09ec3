"""Scores of DD-Ranking (arXiv 2505.13300): accuracy with the help of labels and augmentation taken out.

Accuracies are fractions, so that both scores lie between 0 and 1.
"""

import math


def label_robust_score(full: float, hard: float, own: float, random: float) -> float:
    """LRS: from the accuracy of all images and of the set under hard labels, and of the set and of random
    images under the labels the set comes with.
    """
    hard_label_recovery, improvement_over_random = full - hard, own - random
    return _normalised((improvement_over_random - hard_label_recovery) / 2)


def augmentation_robust_score(*improvements: float) -> float:
    """ARS: from what the set gains over random images with augmentation, and without."""
    return _normalised(sum(improvements) / len(improvements))


def _normalised(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
