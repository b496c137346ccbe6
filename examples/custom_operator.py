"""An operator of one's own: new neurons look along the leading principal components of what their layer reads.

The operator says which directions to try. Finding the places, fitting the fan-out, choosing its ridge, the held-out
gain, norms, optimizers, undo: all that is done by the package, and `dagrow.testing` holds the result to its laws.
"""

from dataclasses import dataclass

import torch
from torch import nn

import dagrow
from dagrow.operators import Moments, Place, Proposal, Widen
from dagrow.testing import check_operator


@dataclass(frozen=True)
class PrincipalComponents(Widen):
    """Widens every axis by neurons with fan-in along the k leading eigenvectors of the correlations of p.

    With the moments ``P = E p p^T [p, p]``, the constant last: covariance ``P_xx - P_x1 P_1x``, fan-in ``alpha [p, k]``
    with the bias that centres each component. Correlations, so that the unit of a feature does not matter.
    """

    k: int = 2

    def propose(self, m: Moments, place: Place) -> Proposal | None:
        if place.channels > 1 or len(place.producers) > 1 or not place.producers[0].bias:
            return None  # kept simple: one layer with a bias writes one channel a neuron
        p = m[place.features, place.features]
        p = p / p[-1, -1]  # per position, where a sample has several
        mean = p[:-1, -1]
        covariance = p[:-1, :-1] - mean[:, None] * mean
        deviation = covariance.diagonal().clamp_min(torch.finfo(p.dtype).tiny).sqrt()
        _, vectors = torch.linalg.eigh(covariance / deviation / deviation[:, None])
        leading = vectors.flip(1)[:, : self.k] / deviation[:, None]
        return Proposal(torch.cat([leading, -(mean @ leading)[None]]))


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(1500, 6) * torch.tensor([3.0, 2.0, 0.3, 0.3, 0.3, 0.3]) + 1
    y = torch.tanh(x[:, :1] - 1) + torch.tanh(x[:, 1:2] - 1)
    batches = list(zip(x.split(250), y.split(250), strict=True))
    loss = nn.functional.mse_loss
    model = nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 1))

    dag = dagrow.trace(model, x[:2])
    optimal, components = (
        dagrow.propose(dag, batches, loss, [op])[0] for op in (dagrow.AddNeurons(k=2), PrincipalComponents(k=2))
    )
    print(optimal, components, sep="\n")
    receipt = dagrow.grow(dag, batches, loss, [PrincipalComponents(k=2)])
    print(receipt)
    assert receipt.neurons == 2
    assert receipt.loss_after < receipt.loss_before
    assert dag.axis("0").width == 3

    check_operator(PrincipalComponents(k=2))
    print("PrincipalComponents obeys all laws")
