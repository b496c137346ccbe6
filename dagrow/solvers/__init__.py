"""The mathematics: from second moments of features and goals to weights, gains and what they are worth.

Plain tensors in, plain tensors out; nothing here knows of models or graphs, and features are any hashable keys. The
letters are those of docs/method.md. The pieces hang together so:

- *Moments*: :class:`Moments` holds sums of products of features in folds of samples; :meth:`Moments.split` gives for
  each fold the moments of all others and its own. Both are a :class:`MomentView`: ``m[x, y]`` is ``E x y^T``.
- *Whitening*: every inverse is one of a positive semidefinite matrix with a ridge relative to each feature's second
  moment, by Cholesky, or by an eigendecomposition with a relative cut-off where the matrix is singular.
- *Rows*: of features with more entries than rows, products are kept as rows, :class:`RowProduct`, and whitened on their
  span. :meth:`MomentView.product` gives either form.
- *Regression*: a :class:`Regression` names new features, what the target reads already, and its goal. What is left of
  features and goals once the latter is taken out is equation 2; :func:`best_move` (1), :func:`directions` (3, 4) and
  :func:`fan_out` (5, 6) solve it; :func:`marginal_drops` and :func:`forward_selection` choose among features.
- *Alternating least squares*: :func:`alternating_least_squares`, where a neuron is read in several slots.
- *Cross-validation*: ``validate_...`` fit on all folds but one, measure on that one, and choose ridge and rank.
- *Significance*: :class:`Verdict` from scores of single samples, and :func:`holm` over all places together.

>>> import torch
>>> from dagrow.solvers import Moments, Regression, best_move, fan_out, validate_fan_out
>>> generator = torch.Generator().manual_seed(0)
>>> b, p = torch.randn(2, 200, 3, generator=generator, dtype=torch.float64)  # what is read; new features
>>> rows = {"b": b, "p": p, "v": b - p @ torch.diag(torch.tensor([2.0, 1.0, 0.0]).double())}
>>> sums = {(x, y): torch.stack([rows[x][f::4].T @ rows[y][f::4] for f in range(4)]) for x in rows for y in rows}
>>> m = Moments(torch.full((4,), 50), sums, dict.fromkeys(rows, 1.0), torch.finfo(torch.float64).eps)
>>> move = best_move(m, "b", "v")
>>> bottleneck = float(m["v", "v"].trace()) - move.drop
>>> bottleneck > 0
True
>>> regression = Regression("p", reads="b", goal="v", compensation="all")
>>> fit = fan_out(m, regression, None)
>>> round(fit.drop / bottleneck, 9)  # p explains all that b leaves over
1.0
>>> validate_fan_out(m.split(), regression, None, ridges=(1e-3, 1.0)).ridge
0.001
"""

from dagrow.solvers._als import SlotMoments, alternating_least_squares
from dagrow.solvers._closed_forms import Fit, Move, best_move, directions, explained, fan_out
from dagrow.solvers._cross_validation import (
    RIDGES,
    FoldFit,
    fan_out_fits,
    move_fits,
    neuron_ridges,
    validate_directions,
    validate_fan_out,
    validate_move,
    with_cross_validated_ridge,
)
from dagrow.solvers._elimination import Reader, least_needed
from dagrow.solvers._grams import add_gram, complete
from dagrow.solvers._linalg import leading_svd
from dagrow.solvers._moments import FoldSplit, FoldView, Moments, MomentView, Pair, distinct
from dagrow.solvers._refit import REFIT_RIDGES, Lost, Refit
from dagrow.solvers._residual import Compensation, Regression
from dagrow.solvers._row_products import Product, RowProduct, Rows
from dagrow.solvers._selection import forward_selection, marginal_drops
from dagrow.solvers._significance import LEVEL, Verdict, holm, upper_tail

__all__ = [
    "LEVEL",
    "REFIT_RIDGES",
    "RIDGES",
    "Compensation",
    "Fit",
    "FoldFit",
    "FoldSplit",
    "FoldView",
    "Lost",
    "MomentView",
    "Moments",
    "Move",
    "Pair",
    "Product",
    "Reader",
    "Refit",
    "Regression",
    "RowProduct",
    "Rows",
    "SlotMoments",
    "Verdict",
    "add_gram",
    "alternating_least_squares",
    "best_move",
    "complete",
    "directions",
    "distinct",
    "explained",
    "fan_out",
    "fan_out_fits",
    "forward_selection",
    "holm",
    "leading_svd",
    "least_needed",
    "marginal_drops",
    "move_fits",
    "neuron_ridges",
    "upper_tail",
    "validate_directions",
    "validate_fan_out",
    "validate_move",
    "with_cross_validated_ridge",
]
