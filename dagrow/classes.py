"""Labels of channels, and which of them are one: union-find in tensors."""

import torch
from torch import Tensor

__all__ = ["NEUTRAL", "Classes", "narrow"]

NEUTRAL = -1  #: the label of entries that belong to no channel: masks, scalars, positions


class Classes:
    """Union-find over labels, for whole tensors at a time. A frozen class keeps the first cause of its freezing."""

    def __init__(self) -> None:
        self.count = 0
        self._roots = torch.full((64,), NEUTRAL)  #: label -> the smallest of its class; NEUTRAL beyond the last label
        self._causes = torch.zeros(64, dtype=torch.int32)  #: root -> its cause, by number
        self._texts = [""]

    def __len__(self) -> int:
        return self.count

    def fresh(self, count: int) -> Tensor:
        """New labels, each a class of its own."""
        start, self.count = self.count, self.count + count
        if self.count >= len(self._roots):  # the last entry stays NEUTRAL's
            more = max(len(self._roots), self.count)
            self._roots = torch.cat([self._roots, torch.full((more,), NEUTRAL)])
            self._causes = torch.cat([self._causes, torch.zeros(more, dtype=torch.int32)])
        labels = torch.arange(start, self.count)
        self._roots[start : self.count] = labels
        return labels

    def copy(self) -> "Classes":
        twin = Classes()
        twin.count, twin._texts = self.count, list(self._texts)
        twin._roots, twin._causes = self._roots.clone(), self._causes.clone()
        return twin

    def roots(self, labels: Tensor) -> Tensor:
        """The labels' representatives, entry by entry."""
        return self._roots[labels]

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Makes labels that meet entry by entry, after broadcasting, one class. NEUTRAL meets nobody."""
        a, b = self._roots[a], self._roots[b]
        meet = a != b
        if not bool(meet.any()):
            return
        pairs = torch.stack([torch.broadcast_to(side, meet.shape)[meet] for side in (a, b)])
        pairs = pairs[:, (pairs != NEUTRAL).all(0)]
        if not pairs.shape[1]:
            return
        met = torch.nonzero(self.chosen(pairs)).flatten()  # few of all labels
        moved = torch.arange(len(self._roots))
        moved[met] = torch.arange(len(met))
        root = self._united(moved[pairs], len(met))
        moved[met] = met[root]
        moved[-1] = NEUTRAL
        self._roots = moved[self._roots]
        self._carry_causes(met, met[root])

    @staticmethod
    def _united(pairs: Tensor, count: int) -> Tensor:
        """The smallest of its class for each of a few numbers, some of which are paired."""
        root = torch.arange(count)
        a, b = pairs
        while bool((a != b).any()):
            root.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
            while not torch.equal(found := root[root], root):
                root = found
            a, b = root[a], root[b]
        return root

    def _carry_causes(self, met: Tensor, roots: Tensor) -> None:
        """Causes sit at roots: one without a cause gets the first of those that it was united with."""
        gone = (self._causes[met] > 0) & (self._causes[roots] == 0)
        if bool(gone.any()):
            first = torch.full_like(self._causes, len(self._texts))
            first.scatter_reduce_(0, roots[gone], self._causes[met[gone]], "amin")
            self._causes = torch.where(first < len(self._texts), first, self._causes)

    def freeze(self, labels: Tensor, cause: str) -> None:
        """Gives the labels' classes a cause, unless they have one."""
        roots = self._roots[narrow(labels).flatten()]
        roots = roots[(roots != NEUTRAL) & (self._causes[roots] == 0)]
        if len(roots):
            self._causes[roots] = len(self._texts)
            self._texts.append(cause)

    def chosen(self, labels: Tensor) -> Tensor:
        """A table of which labels are among these; the last entry is NEUTRAL's."""
        table = torch.zeros(len(self._roots), dtype=torch.bool)
        table[labels] = True
        return table

    def numbers(self, roots: Tensor) -> Tensor:
        """The causes of classes, by number; 0 for none."""
        return self._causes[roots].long()

    def cause(self, label: int) -> str | None:
        """Why the label's class is frozen, or None."""
        return self._texts[int(self._causes[self._roots[label]])] or None


def narrow(tensor: Tensor) -> Tensor:
    """The tensor with every repeated (stride 0) dimension cut to one entry."""
    if not tensor.numel() or 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())]
