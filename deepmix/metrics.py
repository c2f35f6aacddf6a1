"""Clustering accuracy, and scorers with which GridSearchCV can choose among clusterings.

ARI, NMI, V-measure, silhouette and their kin are in :mod:`sklearn.metrics`; what is here is missing
there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone
from sklearn.metrics import adjusted_rand_score, make_scorer, silhouette_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d, resample

__all__ = [
    "SilhouetteScorer",
    "StabilityScorer",
    "clustering_accuracy",
    "clustering_accuracy_scorer",
    "silhouette_scorer",
    "stability_scorer",
]


# --- With labels ---


def clustering_accuracy(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    r"""Accuracy under the best one-to-one matching of clusters to classes.

    .. math:: \mathrm{ACC} = \max_{m} \frac{1}{n} \sum_{i=1}^{n} [y_i = m(c_i)]

    where :math:`m` runs over the one-to-one maps from clusters to classes, and the best is found as
    a linear assignment on the contingency matrix [1]_ [2]_. With more clusters than classes, the
    rows of the clusters left over count as wrong; with fewer, those of the classes left over do.
    A noise label such as -1 is a cluster like any other.

    Parameters
    ----------
    labels_true : array-like of shape (n_samples,)
        Classes, of any type that sorts.
    labels_pred : array-like of shape (n_samples,)
        Clusters. Their names and their number need not be those of the classes.

    Returns
    -------
    float
        Between 0 and 1. It does not change when clusters are renamed. It is not adjusted for
        chance: for that see :func:`sklearn.metrics.adjusted_rand_score`.

    References
    ----------
    .. [1] H. W. Kuhn, "The Hungarian method for the assignment problem", Naval Research Logistics
       Quarterly 2, 83-97, 1955.
    .. [2] Y. Yang, D. Xu, F. Nie, S. Yan, Y. Zhuang, "Image clustering using local discriminant
       models and global integration", IEEE Transactions on Image Processing 19, 2761-2773, 2010.

    Examples
    --------
    >>> from deepmix.metrics import clustering_accuracy
    >>> clustering_accuracy(["cat", "cat", "dog", "dog"], [1, 1, 0, 0])
    1.0
    >>> clustering_accuracy([0, 0, 1, 1], [0, 0, 1, 2])
    0.75
    """
    labels_true, labels_pred = column_or_1d(labels_true), column_or_1d(labels_pred)
    check_consistent_length(labels_true, labels_pred)
    if labels_true.size == 0:
        raise ValueError(
            "clustering_accuracy expects at least one sample, got empty labels: check that the "
            "rows were not all filtered out."
        )
    counts = contingency_matrix(labels_true, labels_pred)  # (n_classes, n_clusters)
    matched = linear_sum_assignment(counts, maximize=True)
    return float(counts[matched].sum() / labels_true.size)


#: :func:`clustering_accuracy` as a scorer ``(estimator, X, y) -> float`` for ``GridSearchCV``.
clustering_accuracy_scorer = make_scorer(clustering_accuracy)


# --- Without labels ---


@dataclass(frozen=True)
class SilhouetteScorer:
    """Mean silhouette of ``estimator.predict(X)`` in the space of the data.

    The space is that of ``X`` on purpose: embeddings learnt by different fits have different
    scales and dimensions, so silhouettes in them do not compare. With fewer than two clusters, or
    as many as rows, the silhouette [1]_ is not defined and the score is its lower limit, -1.

    Parameters
    ----------
    sample_size : int or None, default=5000
        Rows drawn, without replacement, when there are more; the cost grows with its square.
        None takes all.
    metric : str or callable, default='euclidean'
        Distance, as in :func:`sklearn.metrics.silhouette_score`.
    random_state : int, default=0
        Seed of the draw, so that each candidate is scored on the same rows.

    References
    ----------
    .. [1] P. J. Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of
       cluster analysis", Journal of Computational and Applied Mathematics 20, 53-65, 1987.

    Examples
    --------
    >>> from sklearn.cluster import KMeans
    >>> from sklearn.datasets import make_blobs
    >>> from sklearn.model_selection import GridSearchCV
    >>> from deepmix.metrics import silhouette_scorer
    >>> X, _ = make_blobs(300, centers=4, cluster_std=0.5, random_state=0)
    >>> grid = {"n_clusters": [2, 3, 4, 6]}
    >>> search = GridSearchCV(KMeans(random_state=0), grid, scoring=silhouette_scorer)
    >>> search.fit(X).best_params_
    {'n_clusters': 4}
    """

    sample_size: int | None = 5000
    metric: str | Callable = "euclidean"
    random_state: int = 0

    def __call__(self, estimator: Any, X: Any, y: object = None) -> float:
        """Score a fitted estimator on X; y is ignored."""
        if self.sample_size is not None and X.shape[0] > self.sample_size:
            X = resample(
                X, replace=False, n_samples=self.sample_size, random_state=self.random_state
            )
        labels = estimator.predict(X)
        if not 2 <= len(np.unique(labels)) < len(labels):
            return -1.0
        return float(silhouette_score(X, labels, metric=self.metric))


@dataclass(frozen=True)
class StabilityScorer:
    """Mean ARI between the estimator's clustering of X and those of clones refitted on halves of X.

    A number of clusters that fits the data gives the same partition whichever half of the rows it
    is learnt from [1]_ [2]_. One cluster is always stable and says nothing, so fewer than two give
    -1. Too few clusters can be as stable as the right number [3]_: the score warns of too many, and
    is to be read beside another one.

    It costs ``n_repeats`` fits on half of the rows it is given, on top of the fit of the search. A
    clone has the parameters of the estimator, its ``random_state`` too: give that an int, or the
    score is not reproducible.

    Parameters
    ----------
    n_repeats : int, default=5
        Number of random halves.
    random_state : int, default=0
        Seed of the halves, the same for each candidate.

    References
    ----------
    .. [1] A. Ben-Hur, A. Elisseeff, I. Guyon, "A stability based method for discovering structure
       in clustered data", Pacific Symposium on Biocomputing, 6-17, 2002.
    .. [2] T. Lange, V. Roth, M. L. Braun, J. M. Buhmann, "Stability-based validation of clustering
       solutions", Neural Computation 16, 1299-1323, 2004.
    .. [3] U. von Luxburg, "Clustering stability: an overview", Foundations and Trends in Machine
       Learning 2, 235-274, 2010.

    Examples
    --------
    >>> from sklearn.cluster import KMeans
    >>> from sklearn.datasets import make_blobs
    >>> from deepmix.metrics import StabilityScorer
    >>> X, _ = make_blobs(300, centers=3, cluster_std=0.5, random_state=0)
    >>> model = KMeans(n_clusters=3, n_init=5, random_state=0).fit(X)
    >>> StabilityScorer(n_repeats=3)(model, X)
    1.0
    """

    n_repeats: int = 5
    random_state: int = 0

    def __call__(self, estimator: Any, X: Any, y: object = None) -> float:
        """Score a fitted estimator on X; y is ignored."""
        if self.n_repeats < 1:
            raise ValueError(
                f"n_repeats must be at least 1, got {self.n_repeats}: without a refit there is "
                "nothing to compare the clustering with."
            )
        labels = estimator.predict(X)
        if len(np.unique(labels)) < 2:
            return -1.0
        random_state = check_random_state(self.random_state)
        scores = []
        for _ in range(self.n_repeats):
            half = resample(
                X, replace=False, n_samples=max(1, X.shape[0] // 2), random_state=random_state
            )
            scores.append(adjusted_rand_score(labels, clone(estimator).fit(half).predict(X)))
        return float(np.mean(scores))


#: :class:`SilhouetteScorer` with its defaults, ready for ``GridSearchCV(scoring=...)``.
silhouette_scorer = SilhouetteScorer()

#: :class:`StabilityScorer` with its defaults, ready for ``GridSearchCV(scoring=...)``.
stability_scorer = StabilityScorer()
