"""Displays in scikit-learn's style; matplotlib is imported when one is drawn."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from typing_extensions import Self

__all__ = ["CenterDisplay", "EmbeddingDisplay"]


class EmbeddingDisplay:
    """The embedding of an estimator as a scatter plot in the plane.

    Make it with `from_estimator`; embeddings of more than two dimensions are projected on their
    two principal components.

    Parameters
    ----------
    points : ndarray of shape (n_samples, 2)
        Embedded rows.
    labels : ndarray of shape (n_samples,)
        Labels that colour the rows.
    centers : ndarray of shape (n_clusters, 2) or None, default=None
        Centres of the clusters in the same plane.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from deepmix import AECM
    >>> from deepmix.plotting import EmbeddingDisplay
    >>> X = load_iris().data
    >>> model = AECM(
    ...     3, hidden_layer_sizes=(16,), pretrain_max_iter=5, max_iter=5, tol=0, random_state=0
    ... ).fit(X)
    >>> display = EmbeddingDisplay.from_estimator(model, X)
    """

    def __init__(self, points: np.ndarray, labels: np.ndarray, centers: np.ndarray | None = None):
        self.points, self.labels, self.centers = points, labels, centers

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: ArrayLike, y: ArrayLike | None = None, *, ax: "Axes | None" = None
    ) -> "Self":
        """Embed X by ``estimator.transform`` and draw it.

        Parameters
        ----------
        estimator : fitted estimator
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), default=None
            Labels to colour by; None takes ``estimator.predict(X)``.
        ax : matplotlib Axes, default=None

        Returns
        -------
        display : EmbeddingDisplay
        """
        points = np.asarray(estimator.transform(X))
        centers = getattr(estimator, "latent_centers_", None)
        if points.shape[1] > 2:
            projection = PCA(2).fit(points)
            points = projection.transform(points)
            centers = None if centers is None else projection.transform(centers)
        labels = estimator.predict(X) if y is None else np.asarray(y)
        return cls(points, labels, centers).plot(ax=ax)

    def plot(self, ax: "Axes | None" = None) -> "Self":
        """Draw on ``ax``, or on new axes.

        Parameters
        ----------
        ax : matplotlib Axes, default=None

        Returns
        -------
        self : EmbeddingDisplay
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        _, colors = np.unique(self.labels, return_inverse=True)
        ax.scatter(*_planar(self.points), c=colors, cmap="tab10", s=6, alpha=0.6, linewidths=0)
        if self.centers is not None:
            ax.scatter(*_planar(self.centers), c="white", edgecolors="black", marker="s", s=45)
        ax.set(xticks=[], yticks=[])
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _planar(points):
    """Two coordinates of each point; codes of one dimension lie on a line."""
    return np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1])))).T[:2]


class CenterDisplay:
    """The centres of an estimator in data space: as images, or as lines over the features.

    Parameters
    ----------
    centers : ndarray of shape (n_clusters, n_features)
        Centres, drawn in one panel each.
    image_shape : tuple (height, width) or None, default=None
        Height and width of the images; None draws lines.
    titles : sequence of str or None, default=None
        Title of each panel.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from deepmix import ClusteringModule
    >>> from deepmix.plotting import CenterDisplay
    >>> X = load_digits().data
    >>> model = ClusteringModule(10, n_init=2, random_state=0).fit(X)
    >>> display = CenterDisplay.from_estimator(model, image_shape=(8, 8))
    """

    def __init__(
        self,
        centers: np.ndarray,
        image_shape: tuple[int, int] | None = None,
        titles: Sequence[str] | None = None,
    ):
        self.centers, self.image_shape, self.titles = centers, image_shape, titles

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        *,
        image_shape: tuple[int, int] | None = None,
        figure: "Figure | SubFigure | None" = None,
        n_columns: int = 5,
    ) -> "Self":
        """Draw ``estimator.cluster_centers_``, each with its weight for a title.

        Parameters
        ----------
        estimator : fitted estimator
        image_shape : tuple (height, width) or None, default=None
        figure : matplotlib Figure or SubFigure, default=None
        n_columns : int, default=5

        Returns
        -------
        display : CenterDisplay
        """
        titles = [f"{100 * weight:.0f} %" for weight in estimator.weights_]
        display = cls(estimator.cluster_centers_, image_shape, titles)
        return display.plot(figure=figure, n_columns=n_columns)

    def plot(self, figure: "Figure | SubFigure | None" = None, n_columns: int = 5) -> "Self":
        """Draw on ``figure``, or on a new one.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, default=None
        n_columns : int, default=5

        Returns
        -------
        self : CenterDisplay
        """
        import matplotlib.pyplot as plt

        n_rows = math.ceil(len(self.centers) / n_columns)
        if figure is None:
            figure = plt.figure(figsize=(1.2 * n_columns, 1.4 * n_rows), layout="constrained")
        axes = figure.subplots(n_rows, n_columns, squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for i, (ax, center) in enumerate(zip(axes.flat, self.centers, strict=False)):
            if self.image_shape is None:
                ax.plot(center)
            else:
                ax.imshow(np.reshape(center, self.image_shape), cmap="gray_r")
            if self.titles is not None:
                ax.set_title(self.titles[i], fontsize="small")
        self.axes_, self.figure_ = axes, figure
        return self
