"""Units that go: consumers stop reading them little by little, and at amplitude 1 the model does without them.

As a ray, ``W + gamma (-W_S, Delta)``: what consumers read of the units S fades out, and what they read of all others
moves along. That is a change of weights alone, of the network as it is, so that the loss is known along it. At gamma =
1 nothing reads the units any more, and what is written is the narrower model that computes the same.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dagrow.graph import Axis, Dag
from dagrow.surgery._draft import Change, Draft


def removal(dag: Dag, axis: Axis, units: Tensor, moves: Mapping[str, Tensor]) -> Change:
    """The change that takes units of an axis away.

    Args:
        dag: of the model.
        axis: one of its axes.
        units: those that go ``[k]``.
        moves: consumer -> the move of its weights that goes with it ``[o, i]``, the constant last if it has a bias;
            what it says of the columns of these units does not count. Those that are left out do not move.

    Returns:
        The fading, with the narrower model at its end.

    Raises:
        GrowthError: the axis cannot do without the units.
    """
    fade, narrowed = Draft(dag), Draft(dag, [(axis, dag.narrowing(axis, units))])
    for consumer in axis.consumers:
        weight = consumer.matrix(consumer.parameters()["weight"].detach())
        delta = torch.zeros_like(weight).flatten(1)
        move = moves.get(consumer.name)
        if move is not None:
            narrowed.move(consumer, move)
            delta = move.to(weight, copy=True)
        gone = axis.layout.columns[consumer.name][units].flatten()
        columns = delta[:, : weight[0].numel()].unflatten(1, weight.shape[1:])
        columns[:, gone] = -weight[:, gone]
        if consumer.name in axis.layout.rows:  # it writes some of the units itself: they go as they are
            delta[axis.layout.rows[consumer.name][units].flatten()] = 0
        fade.move(consumer, delta)
    return replace(fade.change(), narrowed=narrowed.change())
