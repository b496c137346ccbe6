"""Which labels are one class: union-find over whole tensors at a time.

In come tensors of labels that meet, out go their representatives and why a class is frozen.

Tensors of labels are small and there are many of them, so that numpy's arrays, which share their memory, serve here.
"""

import numpy as np
import torch
from torch import Tensor

from dagrow.axes._label_tensors import NO_CHANNEL, unexpanded


class UnionFind:
    """Union-find over labels, for whole tensors at a time. A frozen class keeps the first reason of its freezing.

    Attributes:
        unions: how often classes became one.
        first_changed: labels smaller than this are still the smallest of their classes if they were so.
    """

    def __init__(self) -> None:
        self.count, self.unions, self.first_changed = 0, 0, 2**62
        #: label -> a smaller one of its class, or itself if it is the smallest; NO_CHANNEL beyond the last label
        self._parents = np.full(64, NO_CHANNEL)
        self._reason_numbers = np.zeros(64, dtype=np.int32)  #: the smallest of a class -> its reason, by number
        self._reasons = [""]

    def __len__(self) -> int:
        return self.count

    def fresh(self, count: int) -> Tensor:
        """New labels, each a class of its own."""
        start, self.count = self.count, self.count + count
        if self.count >= len(self._parents):  # the last entry stays NO_CHANNEL's
            more = max(len(self._parents), self.count)
            self._parents = np.concatenate([self._parents, np.full(more, NO_CHANNEL)])
            self._reason_numbers = np.concatenate([self._reason_numbers, np.zeros(more, dtype=np.int32)])
        labels = np.arange(start, self.count)
        self._parents[start : self.count] = labels
        return torch.from_numpy(labels)

    def copy(self) -> "UnionFind":
        """A twin, in which nothing has changed yet."""
        twin = UnionFind()
        twin.count, twin._reasons = self.count, list(self._reasons)
        twin._parents, twin._reason_numbers = self._parents.copy(), self._reason_numbers.copy()
        return twin

    def roots(self, labels: Tensor) -> Tensor:
        """The labels' representatives, the smallest of their classes, entry by entry."""
        return torch.from_numpy(self._roots(labels.numpy()))

    def _roots(self, labels: np.ndarray) -> np.ndarray:
        roots, parents = labels, self._parents[labels]
        while (roots != parents).any():
            roots, parents = parents, self._parents[parents]
        return np.asarray(parents)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Makes labels that meet entry by entry, after broadcasting, one class. NO_CHANNEL meets nobody."""
        left, right = self._roots(a.numpy()), self._roots(b.numpy())
        if _is_crossed(left, right) and NO_CHANNEL not in left and NO_CHANNEL not in right:  # which would join nobody
            left, right = _star_pairs(left, right)
        differ = left != right
        if not differ.any():
            return
        differ &= (left != NO_CHANNEL) & (right != NO_CHANNEL)
        left, right = (np.broadcast_to(side, differ.shape)[differ] for side in (left, right))
        if len(left):
            self._unite_roots(left, right)

    def _unite_roots(self, left: np.ndarray, right: np.ndarray) -> None:
        """Makes one class of each pair of different representatives."""
        first = min(left.min(), right.min())
        occurs = np.zeros(max(left.max(), right.max()) + 1 - first, dtype=bool)
        occurs[left - first] = occurs[right - first] = True
        met = np.flatnonzero(occurs)
        position = np.empty(len(occurs), dtype=np.int64)
        position[met] = np.arange(len(met))
        smallest = _smallest_connected(position[left - first], position[right - first], len(met))
        met += first
        self._parents[met] = met[smallest]
        self.unions += 1
        self.first_changed = min(self.first_changed, int(met[smallest != np.arange(len(met))][0]))
        self._pass_reasons(met, met[smallest])

    def _pass_reasons(self, met: np.ndarray, roots: np.ndarray) -> None:
        """Reasons sit at roots: one without a reason gets the first of those that it was united with."""
        passed = (self._reason_numbers[met] > 0) & (self._reason_numbers[roots] == 0)
        if passed.any():
            heirs = np.unique(roots[passed])
            self._reason_numbers[heirs] = len(self._reasons)
            np.minimum.at(self._reason_numbers, roots[passed], self._reason_numbers[met[passed]])

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Gives the labels' classes a reason, unless they have one."""
        roots = self._roots(unexpanded(labels).numpy()).ravel()
        roots = roots[(roots != NO_CHANNEL) & (self._reason_numbers[roots] == 0)]
        if len(roots):
            self._reason_numbers[roots] = len(self._reasons)
            self._reasons.append(reason)

    def membership(self, labels: Tensor) -> Tensor:
        """A table of which labels are among these; the last entry is NO_CHANNEL's."""
        table = torch.zeros(len(self._parents), dtype=torch.bool)
        table[labels] = True
        return table

    def reason_numbers(self, roots: Tensor) -> Tensor:
        """The reasons of classes, by number; 0 for none."""
        return torch.from_numpy(np.asarray(self._reason_numbers[roots.numpy()])).long()

    def reason(self, label: int) -> str | None:
        """Why the label's class is frozen, or None."""
        root = int(self._roots(np.asarray(label)))
        return self._reasons[int(self._reason_numbers[root])] or None


def _smallest_connected(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """The smallest of its class for each of a few numbers, some of which are paired."""
    root = np.arange(count)
    while (a != b).any():
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while ((further := root[root]) != root).any():
            root = further
        a, b = root[a], root[b]
    return root


def _is_crossed(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether each is repeated along a dimension of the other, so that all of one meet all of the other there."""
    sizes = [(x, y) for x, y in zip(a.shape[::-1], b.shape[::-1], strict=False) if x != y]
    return any(x == 1 for x, _ in sizes) and any(y == 1 for _, y in sizes)


def _star_pairs(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewer pairs that join the same: all of one side with the first of the other, instead of all with all."""
    pairs = [np.broadcast_arrays(left, _first(right, left)), np.broadcast_arrays(_first(left, right), right)]
    a, b = (np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs, strict=True))
    return a, b


def _first(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The first entries along the dimensions in which b is repeated."""
    padded = (1,) * (a.ndim - b.ndim) + b.shape[max(0, b.ndim - a.ndim) :]
    return a[tuple(slice(0, 1) if size == 1 else slice(None) for size in padded)]
