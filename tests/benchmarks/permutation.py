"""Whether a growth explains more than chance, asked in another way: by giving the goals to the wrong samples.

    python tests/benchmarks/permutation.py [--samples 200] [--permutations 99] [--noise 2.0]

With ``b`` regressed out of the new features and of the goals, ``p' = p - C S^-1 b`` and ``v_perp = v - dW b``, any
``W`` with ``W P' W^T = 1`` (and a small ridge) gives the part of the goals that the best single direction explains,

    l^2 / E|v*|^2,      l the largest singular value of W E p' v_perp^T.

Permuted goals ``v_perp`` of other samples, all positions of a sample together, have nothing to do with the features,
but for chance; of them, too, b is regressed out before their size is taken, ``v* = v_perp,pi(n) - dW_pi b``. If goals
are exchangeable, which they are if they do not depend on the features, all of these parts are draws from one
distribution, up to what b takes up (Freedman and Lane 1983). No fit on other folds, no normal distribution, and none of
dagrow's statistics: what layers read and their goals are caught by hooks on a copy of the model, and kept whole.

The script prints the test beside z for a network that lacks a neuron.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow.statistics import sample_count

RIDGE = 0.1  #: of the new features, relative to each one's second moment
SLACK = 1e-9  #: parts that differ by less, relatively, are equal


@dataclass(frozen=True)
class PermutationTest:
    """How much the best single direction explains, of the goals as they are and of permuted ones.

    Attributes:
        where: the growth's place.
        part: the part of what is left of the goals that the direction explains.
        permuted: the same for each permutation ``[permutations]``.
        p_value: the rank of the part among all, ``(1 + how many permuted ones are as large) / (1 + permutations)``.
            For one place: to compare several, multiply it by their number.
        samples: how many were measured.
    """

    where: str
    part: float
    permuted: Tensor = field(repr=False)
    p_value: float
    samples: int

    def __str__(self) -> str:
        count, mean, most = len(self.permuted), float(self.permuted.mean()), float(self.permuted.max())
        return (
            f"{self.where}: one direction explains {self.part:.3%} of what is left of the goals; of goals permuted "
            f"{count} times {mean:.3%} on average, {most:.3%} at most; p {self.p_value:.2g}"
        )


def permutation_test(growth: dagrow.Growth, permutations: int = 99, *, seed: int = 0) -> PermutationTest:
    """Permutes a place's goals among samples, and compares the leading singular values. Changes nothing.

    It is exact where the noise of the goals is the same for all samples; z does not ask for that, but for many samples.
    All rows are held at once: ``n s (p + i + o)`` numbers in float64, p the new features (as often as the consumer's
    kernel has taps), i and o what the target reads and writes.

    Args:
        growth: of ``MoveWeights``, or of ``AddNeurons`` on an axis that one layer writes, not applied yet. It tells the
            place; how many neurons it adds and with which weights makes no difference.
        permutations: how many; the smallest p-value is ``1 / (1 + permutations)``.
        seed: of the permutations.

    Raises:
        GrowthError: the growth is stale.
        ValueError: it is at a place of another kind.

    Source: Freedman and Lane 1983, for rows of several positions; the leading singular value in place of F.
    """
    growth.check_fresh()
    targets = _targets(growth)
    gram = torch.stack([target.gram for target in targets]).mean(0)
    unit = torch.stack([target.unit for target in targets]).mean(0)
    alive = unit > 0
    factor = torch.linalg.cholesky((gram + RIDGE * unit.diag())[alive][:, alive])
    samples, generator = len(targets[0].left), torch.Generator().manual_seed(seed)
    orders = [torch.arange(samples), *(torch.randperm(samples, generator=generator) for _ in range(permutations))]
    parts = torch.stack([_part(targets, alive, factor, order) for order in orders])
    part, permuted = float(parts[0]), parts[1:]
    as_large = int((permuted >= part * (1 - SLACK)).sum())
    return PermutationTest(growth.where, part, permuted, (1 + as_large) / (1 + permutations), samples)


@dataclass(frozen=True, eq=False)
class Target:
    """What is left at one target once b is regressed out: features ``[n s, p, taps]`` and goals ``[n, s, o]``."""

    features: Tensor
    left: Tensor
    unit: Tensor  #: ``E p^2`` before, the mean over taps ``[p]``
    read: Tensor | None  #: orthonormal columns that span b ``[n s, rank]``

    @classmethod
    def of(cls, features: Tensor, read: Tensor | None, goals: Tensor) -> "Target":
        """From ``p [n, s, p, taps]``, ``b [n, s, i]`` and ``v [n, s, o]``."""
        new, left, span = features.flatten(0, 1), goals.flatten(0, 1), None
        unit = new.square().sum((0, 2)) / new.shape[2]
        if read is not None:
            u, values, _ = torch.linalg.svd(read.flatten(0, 1), full_matrices=False)
            span = u[:, values > 1e-12 * values[0]]
            new = new - torch.einsum("rk, qk, qpe -> rpe", span, span, new)
            left = left - span @ (span.T @ left)
        return cls(new, left.view_as(goals), unit, span)

    @property
    def gram(self) -> Tensor:
        """The mean over taps of sums of ``p' p'^T`` ``[p, p]``."""
        return torch.einsum("rpe, rqe -> pq", self.features, self.features) / self.features.shape[2]


def _part(targets: Sequence[Target], alive: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """The part that the best direction explains of goals in another order of samples."""
    sides, size = [], factor.new_zeros(())
    for target in targets:
        goals = target.left[order].flatten(0, 1)
        sides.append(torch.einsum("rpe, ro -> peo", target.features, goals).flatten(1))
        size += goals.square().sum()
        if target.read is not None:
            size -= (target.read.T @ goals).square().sum()
    whitened = torch.linalg.solve_triangular(factor, torch.cat(sides, 1)[alive], upper=False)
    explained = torch.linalg.matrix_norm(whitened, 2).square()
    return explained / size if size > 0 else torch.zeros_like(size)


def _targets(growth: dagrow.Growth) -> list[Target]:
    dag = growth.dag
    if isinstance(growth.operator, dagrow.MoveWeights):
        (edge,) = (edge for edge in dag.edges if edge.name == growth.where)
        layers = _observed(growth, [edge])
        return [Target.of(layers[edge.name].features[..., None], None, layers[edge.name].goals)]
    if not isinstance(growth.operator, dagrow.AddNeurons):
        raise ValueError(f"a growth of {growth.operator!r}; give one of AddNeurons or MoveWeights.")
    axis = dag.axis(growth.where)
    if len(axis.producers) > 1:
        raise ValueError(f"axis {axis.name} is written by several layers; give an axis that one layer writes.")
    layers = _observed(growth, [*axis.producers, *axis.consumers])
    producer = layers[axis.producers[0].name]
    readers = [layers[consumer.name] for consumer in axis.consumers]
    return [Target.of(_taps(producer, reader), reader.features, reader.goals) for reader in readers]


@dataclass(frozen=True, eq=False)
class Observed:
    """What a layer read ``[n, s, i]``, a constant last, and its goals ``[n, s, o]``; ``shape`` is that of its image."""

    module: nn.Module
    features: Tensor
    goals: Tensor
    shape: torch.Size


def _unfolded(image: Tensor, conv: nn.Conv2d) -> Tensor:
    """``[n, s, i taps]``."""
    return functional.unfold(image, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT  # type: ignore[arg-type]


def _taps(producer: Observed, reader: Observed) -> Tensor:
    """What the producer read, as often as the reader reads it at a position ``[n, s, p, taps]``."""
    rows, conv = producer.features, reader.module
    if isinstance(conv, nn.Conv2d):
        image = rearrange(rows, "n (h w) p -> n p h w", h=producer.shape[-2])
        return rearrange(_unfolded(image, conv), "n s (p e) -> n s p e", p=rows.shape[2])
    if rows.shape[1] != reader.goals.shape[1]:
        raise ValueError("what the producer writes at a position is not read at one position.")
    return rows[..., None]


def _observed(growth: dagrow.Growth, edges: Sequence[dagrow.Edge]) -> dict[str, Observed]:
    """Layers on all batches, by hooks on a copy of the model."""
    objective, model = growth.objective, copy.deepcopy(growth.dag.model)
    model.train(objective.mode == "train").requires_grad_(True)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {edge.name: [] for edge in edges}
    modules, shapes = {edge.name: model.get_submodule(edge.name) for edge in edges}, dict[str, torch.Size]()

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name], shapes[name] = (inputs[0].detach(), output), output.shape

    for name, module in modules.items():
        module.register_forward_hook(partial(keep, name))
    for batch in objective.batches:
        n = sample_count(batch)
        loss = objective.function(model, batch) * objective.scale(n) * n
        gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
        for (name, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
            rows[name].append(_rows(modules[name], x, -gradient))
    sizes = {name: sorted({goals.shape[1] for _, goals in parts}) for name, parts in rows.items()}
    if any(len(positions) > 1 for positions in sizes.values()):
        raise ValueError(f"positions in a sample differ from batch to batch: {sizes}; give samples of one size.")
    return {
        name: Observed(modules[name], *(torch.cat(part) for part in zip(*parts, strict=True)), shapes[name])
        for name, parts in rows.items()
    }


def _rows(module: nn.Module, x: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
    """Of one batch, what a layer reads ``[n, s, i]`` and its goals ``[n, s, o]``, in float64."""
    n = len(x)
    if isinstance(module, nn.Linear):
        features, goals = x.reshape(n, -1, x.shape[-1]), goals.reshape(n, -1, goals.shape[-1])
    elif isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        features, goals = _unfolded(x, module), goals.flatten(2).mT
    else:
        raise ValueError(f"a {type(module).__name__}; give a growth between nn.Linear and plain nn.Conv2d layers.")
    if module.bias is not None:
        features = torch.cat([features, torch.ones_like(features[..., :1])], -1)
    return features.double(), goals.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--permutations", type=int, default=99)
    parser.add_argument("--noise", type=float, default=2.0, help="times what the missing neuron adds")
    settings = parser.parse_args()
    torch.manual_seed(0)
    x, model = torch.randn(settings.samples, 4), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    signal = torch.tanh(x @ torch.randn(4, 1)) @ torch.randn(1, 2)
    y = model(x).detach() + signal + settings.noise * signal.std() * torch.randn_like(signal)
    operators: list[Any] = [dagrow.MoveWeights(), dagrow.AddNeurons(k=1)]
    for growth in dagrow.propose(dagrow.trace(model, x[:2]), [(x, y)], functional.mse_loss, operators):
        print(f"{permutation_test(growth, settings.permutations)}; z of {growth.operator!r} {growth.z:.3g}")


if __name__ == "__main__":
    main()
