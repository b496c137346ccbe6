"""Which units are needed least, by what is lost of what their readers compute once the others stand in for them.

A layer reads features ``b`` with weights ``W``. Without the units S the rest, ``b_R``, stands in for what they wrote,
``W_S b_S``, by least squares; and what is lost, with ``G = E b b^T`` and ``H = (G + ridge)^-1``, is

    min over Delta of  E|W_S b_S - Delta b_R|^2 + ridge |Delta|^2  =  tr W_S H_SS^-1 W_S^T - ridge |W_S|^2.

Units go one after the other, each the one by which least more is lost; H and W follow in closed form.
Source: Hassibi and Stork 1993 (Optimal Brain Surgeon), whose Hessian is here the second moment of what a layer reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

JITTER = 1e-10  #: a ridge relative to each feature's second moment, so that twins can be told from nothing
ROUNDED = 64  #: times what products of features tell apart: no ridge is smaller


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the units.

    Attributes:
        gram: ``G = E b b^T [i, i]``, with the constant of its bias among b.
        weights: ``W [o, i]``.
        columns: the features of each unit ``[U, m]``.
        outputs: the unit that each output is of ``[o]``, -1 for none: it goes with the unit.
        is_trainable: whether the other weights may move.
    """

    gram: Tensor
    weights: Tensor
    columns: Tensor
    outputs: Tensor
    is_trainable: bool = True


def least_needed(readers: Sequence[Reader], k: int, ridge: float = 0.0, resolution: float = 0.0) -> Tensor:
    """The units that go first, in the order in which they go.

    Args:
        readers: all layers that read them.
        k: how many, less than there are.
        ridge: relative to each feature's second moment.
        resolution: relative precision of the Grams.

    Returns:
        The units ``[k]``.
    """
    ridge += max(JITTER, ROUNDED * resolution)
    states = [_Refitted(reader, ridge) if reader.is_trainable else _Frozen(reader) for reader in readers]
    gone: list[int] = []
    for _ in range(k):
        lost = torch.stack([state.lost().cpu() for state in states]).sum(0)
        lost[gone] = float("inf")
        gone.append(int(lost.argmin()))
        for state in states:
            state.remove(gone[-1])
    return torch.tensor(gone, dtype=torch.long)


class _State(ABC):
    """A reader as it is without the units that have gone."""

    def __init__(self, reader: Reader) -> None:
        unit = reader.gram.diagonal().double().clamp_min(0)
        size = torch.where(unit > 0, unit, 1).sqrt()
        self.columns, self.outputs = reader.columns.to(size.device), reader.outputs.to(size.device)
        self.gram = reader.gram.double() / size / size[:, None]
        self.weights = reader.weights.double() * unit.sqrt()  # of features of size 1; dead ones write nothing
        self.stay = torch.ones_like(self.outputs, dtype=torch.bool)

    def of_unit(self, unit: int) -> Tensor:
        return self.columns[unit]

    def counted(self, lost: Tensor) -> Tensor:
        """What is lost by each unit ``[U]`` of each output ``[U, o]``, less those that go, or went, themselves."""
        own = self.outputs == torch.arange(len(lost), device=lost.device)[:, None]
        return (lost * (self.stay & ~own)).sum(1)

    @abstractmethod
    def lost(self) -> Tensor:
        """What is lost more if a unit goes, of each ``[U]``."""

    @abstractmethod
    def remove(self, unit: int) -> None:
        """A unit goes."""
        self.stay &= self.outputs != unit


class _Refitted(_State):
    """The others stand in for what has gone."""

    def __init__(self, reader: Reader, ridge: float) -> None:
        super().__init__(reader)
        self.ridge, self.first = ridge, self.weights.clone()
        self.inverse = torch.cholesky_inverse(
            torch.linalg.cholesky(self.gram + ridge * torch.eye(len(self.gram)).to(self.gram))
        )

    def lost(self) -> Tensor:
        columns = self.columns
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]  # [U, m, m]
        weights, first = (w[:, columns].movedim(1, 0) for w in (self.weights, self.first))  # [U, o, m]
        back = torch.linalg.solve(blocks, weights.mT).mT
        return self.counted((back * weights).sum(2) - self.ridge * first.square().sum(2))

    def remove(self, unit: int) -> None:
        super().remove(unit)
        gone = self.of_unit(unit)
        spread = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])  # H_uu^-1 H_u: [m, i]
        self.weights = self.weights - self.weights[:, gone] @ spread
        self.inverse = self.inverse - self.inverse[:, gone] @ spread
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0
        self.inverse[gone, gone] = 1  # so that it stays invertible; their weights are 0
        self.weights[:, gone] = 0


class _Frozen(_State):
    """Nothing stands in for what has gone."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self.gone = torch.zeros_like(self.weights)  #: the weights of what has gone

    def lost(self) -> Tensor:
        columns = self.columns
        blocks, weights = self.gram[columns[:, :, None], columns[:, None, :]], self.weights[:, columns].movedim(1, 0)
        beside = (self.gone @ self.gram)[:, columns].movedim(1, 0)
        return self.counted(((weights @ blocks) * weights + 2 * beside * weights).sum(2))

    def remove(self, unit: int) -> None:
        super().remove(unit)
        gone = self.of_unit(unit)
        self.gone[:, gone] = self.weights[:, gone]
