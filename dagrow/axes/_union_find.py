"""Labels of channels, and which of them are one: union-find over whole tensors at a time.

Tensors of labels are small and there are many of them, so that numpy's arrays, which share their memory, serve here.
"""

import numpy as np
import torch
from torch import Tensor

NO_CHANNEL = -1  #: the label of entries that belong to no channel: masks, scalars, positions


class UnionFind:
    """Union-find over labels, for whole tensors at a time. A frozen class keeps the first cause of its freezing.

    Attributes:
        unions: how often classes became one.
        changed: labels smaller than this are still the smallest of their classes if they were so.
    """

    def __init__(self) -> None:
        self.count, self.unions, self.changed = 0, 0, 2**62
        #: label -> a smaller one of its class, or itself if it is the smallest; NO_CHANNEL beyond the last label
        self._parents = np.full(64, NO_CHANNEL)
        self._causes = np.zeros(64, dtype=np.int32)  #: the smallest of a class -> its cause, by number
        self._texts = [""]

    def __len__(self) -> int:
        return self.count

    def fresh(self, count: int) -> Tensor:
        """New labels, each a class of its own."""
        start, self.count = self.count, self.count + count
        if self.count >= len(self._parents):  # the last entry stays NO_CHANNEL's
            more = max(len(self._parents), self.count)
            self._parents = np.concatenate([self._parents, np.full(more, NO_CHANNEL)])
            self._causes = np.concatenate([self._causes, np.zeros(more, dtype=np.int32)])
        labels = np.arange(start, self.count)
        self._parents[start : self.count] = labels
        return torch.from_numpy(labels)

    def copy(self) -> "UnionFind":
        """A twin, in which nothing has changed yet."""
        twin = UnionFind()
        twin.count, twin._texts = self.count, list(self._texts)
        twin._parents, twin._causes = self._parents.copy(), self._causes.copy()
        return twin

    def roots(self, labels: Tensor) -> Tensor:
        """The labels' representatives, the smallest of their classes, entry by entry."""
        return torch.from_numpy(self._roots(labels.numpy()))

    def _roots(self, labels: np.ndarray) -> np.ndarray:
        found, further = labels, self._parents[labels]
        while (found != further).any():
            found, further = further, self._parents[further]
        return np.asarray(further)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Makes labels that meet entry by entry, after broadcasting, one class. NO_CHANNEL meets nobody."""
        left, right = self._roots(a.numpy()), self._roots(b.numpy())
        if _crossed(left, right) and NO_CHANNEL not in left and NO_CHANNEL not in right:  # which would join nobody
            left, right = _stars(left, right)
        meet = left != right
        if not meet.any():
            return
        meet &= (left != NO_CHANNEL) & (right != NO_CHANNEL)
        left, right = (np.broadcast_to(side, meet.shape)[meet] for side in (left, right))
        if not len(left):
            return
        first = min(left.min(), right.min())
        held = np.zeros(max(left.max(), right.max()) + 1 - first, dtype=bool)
        held[left - first] = held[right - first] = True
        met = np.flatnonzero(held)
        place = np.empty(len(held), dtype=np.int64)
        place[met] = np.arange(len(met))
        root = self._united(place[left - first], place[right - first], len(met))
        met += first
        self._parents[met] = met[root]
        self.unions += 1
        self.changed = min(self.changed, int(met[root != np.arange(len(met))][0]))
        self._carry_causes(met, met[root])

    @staticmethod
    def _united(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
        """The smallest of its class for each of a few numbers, some of which are paired."""
        root = np.arange(count)
        while (a != b).any():
            np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
            while ((found := root[root]) != root).any():
                root = found
            a, b = root[a], root[b]
        return root

    def _carry_causes(self, met: np.ndarray, roots: np.ndarray) -> None:
        """Causes sit at roots: one without a cause gets the first of those that it was united with."""
        gone = (self._causes[met] > 0) & (self._causes[roots] == 0)
        if gone.any():
            heirs = np.unique(roots[gone])
            self._causes[heirs] = len(self._texts)
            np.minimum.at(self._causes, roots[gone], self._causes[met[gone]])

    def freeze(self, labels: Tensor, cause: str) -> None:
        """Gives the labels' classes a cause, unless they have one."""
        roots = self._roots(narrow(labels).numpy()).ravel()
        roots = roots[(roots != NO_CHANNEL) & (self._causes[roots] == 0)]
        if len(roots):
            self._causes[roots] = len(self._texts)
            self._texts.append(cause)

    def chosen(self, labels: Tensor) -> Tensor:
        """A table of which labels are among these; the last entry is NO_CHANNEL's."""
        table = torch.zeros(len(self._parents), dtype=torch.bool)
        table[labels] = True
        return table

    def numbers(self, roots: Tensor) -> Tensor:
        """The causes of classes, by number; 0 for none."""
        return torch.from_numpy(np.asarray(self._causes[roots.numpy()])).long()

    def cause(self, label: int) -> str | None:
        """Why the label's class is frozen, or None."""
        root = int(self._roots(np.asarray(label)))
        return self._texts[int(self._causes[root])] or None


def _crossed(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether each is repeated along a dimension of the other, so that all of one meet all of the other there."""
    sides = [(x, y) for x, y in zip(a.shape[::-1], b.shape[::-1], strict=False) if x != y]
    return any(x == 1 for x, _ in sides) and any(y == 1 for _, y in sides)


def _stars(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fewer pairs that join the same: all of one side with the first of the other, instead of all with all."""
    pairs = [np.broadcast_arrays(left, _first(right, left)), np.broadcast_arrays(_first(left, right), right)]
    one, other = (np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs, strict=True))
    return one, other


def _first(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The first entries along the dimensions in which b is repeated."""
    padded = (1,) * (a.ndim - b.ndim) + b.shape[max(0, b.ndim - a.ndim) :]
    return a[tuple(slice(0, 1) if size == 1 else slice(None) for size in padded)]


def narrow(tensor: Tensor) -> Tensor:
    """The tensor with every repeated (stride 0) dimension cut to one entry."""
    strides = tensor.stride()
    if 0 not in strides or not tensor.numel():
        return tensor
    return tensor.as_strided([size if step else 1 for size, step in zip(tensor.shape, strides, strict=True)], strides)
