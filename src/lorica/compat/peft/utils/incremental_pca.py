"""peft.utils.incremental_pca: principal components of data that come in batches.

lorica's EVA does not use it (see :mod:`lorica.init`); it is here for code that uses it by itself. One batch changes the
decomposition by the SVD of the components so far, the new rows, and the step of the mean between them
(D. Ross et al., "Incremental Learning for Robust Visual Tracking", 2008, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class IncrementalPCA:
    """Principal components of rows that come in batches; after ``fit`` or ``partial_fit`` the attributes hold them.

    Args:
        n_components: how many to keep; None: as many as the first batch allows.
        copy: leave the input as it is.
        batch_size: rows that :meth:`fit` takes at once; None: five times the number of features.
        svd_driver: the method of ``torch.linalg.svd`` on CUDA.
        lowrank: use ``torch.svd_lowrank``.
        lowrank_q: its size; None: twice ``n_components``.
        lowrank_niter: its number of iterations.
        lowrank_seed: makes it reproducible.

    Attributes:
        components_: ``[n_components, features]``, orthonormal rows.
        singular_values_: of the components.
        explained_variance_: along each component.
        explained_variance_ratio_: the same as shares of the whole.
        mean_, var_: of each feature.
        n_samples_seen_: how many rows there were.

    Raises:
        ValueError: the arguments contradict each other, or a batch has fewer rows or features than components.
    """

    components_: Tensor
    singular_values_: Tensor
    mean_: Tensor
    var_: Tensor
    n_samples_seen_: int

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            lowrank_q = 2 * n_components
        if lowrank and lowrank_q is not None and n_components is not None and lowrank_q < n_components:
            raise ValueError("lowrank_q must be greater than or equal to n_components.")
        self.n_components = n_components
        self.copy = copy
        self.batch_size = batch_size
        self.svd_driver = svd_driver
        self.lowrank = lowrank
        self.lowrank_q = lowrank_q
        self.lowrank_niter = lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_features_: int | None = None

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take in all rows of ``X`` ``[rows, features]``, in batches; return the object."""
        rows = self._checked(X) if check_input else X
        self.n_features_ = None
        size = self.batch_size or 5 * rows.shape[1]
        least = self.n_components or 1
        pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
        if len(pieces) > 1 and len(pieces[-1]) < least:  # too few rows to stand alone
            pieces[-2:] = [torch.cat(pieces[-2:])]
        for piece in pieces:
            self.partial_fit(piece, check_input=False)
        return self

    @torch.no_grad()
    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take in a further batch ``[rows, features]``; return the object."""
        rows: Tensor = self._checked(X) if check_input else X
        count, features = rows.shape
        if self.n_features_ is None:
            self._begin(rows)
        elif self.n_features_ != features:
            raise ValueError(
                "Number of features of the new batch does not match the number of features of the first batch."
            )
        seen = self.n_samples_seen_
        total = seen + count
        mean_of_batch = rows.mean(0)
        step = mean_of_batch - self.mean_
        centred = rows - mean_of_batch
        scatter = self.var_ * seen + centred.double().square().sum(0) + step.double().square() * (seen * count / total)
        if seen:
            between = (seen * count / total) ** 0.5 * step
            stacked = torch.vstack([self.singular_values_[:, None] * self.components_, centred, between])
        else:
            stacked = centred
        values, right = self._svd(stacked)
        right = right * torch.sign(right.gather(1, right.abs().argmax(1, keepdim=True)))
        kept = self.n_components_
        variance = values.square() / max(total - 1, 1)
        self.n_samples_seen_ = total
        self.mean_ = self.mean_ + step * (count / total)
        self.var_ = scatter / total
        self.components_, self.singular_values_ = right[:kept], values[:kept]
        self.explained_variance_ = variance[:kept]
        self.explained_variance_ratio_ = values[:kept].square() / scatter.sum()
        rest = variance[kept:]
        self.noise_variance_ = rest.mean() if len(rest) else values.new_zeros(())
        return self

    def transform(self, X: Tensor) -> Tensor:
        """Return the coordinates ``[rows, n_components]`` of rows along the components."""
        rows: Tensor = X.to(self.components_.dtype) - self.mean_
        return rows @ self.components_.T

    def _begin(self, rows: Tensor) -> None:
        self.n_features_ = rows.shape[1]
        self.n_components_ = min(rows.shape) if self.n_components is None else self.n_components
        self.n_samples_seen_ = 0
        self.mean_ = rows.new_zeros(rows.shape[1])
        self.var_ = rows.new_zeros(rows.shape[1], dtype=torch.float64)

    def _svd(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self.lowrank:
            _, values, right = torch.linalg.svd(rows, full_matrices=False, driver=self.svd_driver)
            return values, right
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            _, values, right = torch.svd_lowrank(rows, q=self.lowrank_q, niter=self.lowrank_niter)
        return values, right.mH

    def _checked(self, X: Any) -> Tensor:
        rows = X if isinstance(X, Tensor) else torch.tensor(X, dtype=torch.float32)
        if self.copy and rows is X:
            rows = rows.clone()
        count, features = rows.shape
        if self.n_components is not None and self.n_components > features:
            raise ValueError(
                f"n_components={self.n_components} invalid for n_features={features}, "
                "need more rows than columns for IncrementalPCA processing."
            )
        if self.n_components is not None and self.n_components > count:
            raise ValueError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {count}"
            )
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


__all__ = ["IncrementalPCA"]
