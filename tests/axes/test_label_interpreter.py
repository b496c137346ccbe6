"""What operations do to labels of channels is what torch does to numbers, or a reason not to grow."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from between import Between
from torch import Tensor
from torch.nn import functional

from dagrow.axes import NO_CHANNEL, Labelling, labelled
from dagrow.layers import DEFAULT_RULES, layer_sites
from dagrow.tracing import record

Use = Callable[[Any, Tensor], Tensor]


def labelling_of(use: Use, width: int = 4) -> tuple[Labelling, Tensor]:
    """The run on labels of what is between two layers, and what the second layer reads."""
    model, x = Between(use, width), torch.randn(3, 3)
    graph = record(model, x).graph
    layers, labelling = labelled(graph, model, layer_sites(graph, model, DEFAULT_RULES))
    last = next(layer for layer in layers.values() if layer.name == "last")
    return labelling, labelling.values[last.inputs]


@pytest.mark.parametrize(
    ("use", "width"),
    [
        (lambda m, h: h.view(-1, 2, 2).permute(0, 2, 1).flatten(1), 4),
        (lambda m, h: torch.cat([h, h[:, :1]], 1)[:, 1:], 4),
        (lambda m, h: h.flip(1), 4),
        (lambda m, h: h.unflatten(1, (2, 3)).transpose(1, 2).reshape(-1, 6)[:, :6], 6),
        (lambda m, h: torch.stack(h.chunk(2, 1), 2).flatten(1), 4),
        (lambda m, h: h.roll(1, 1).unsqueeze(0).squeeze(0), 4),
        (lambda m, h: functional.pixel_shuffle(h[:, :, None, None], 2).flatten(1), 4),
    ],
)
def test_what_moves_entries_moves_labels(use: Use, width: int) -> None:
    labelling, labels = labelling_of(use, width)
    rows = labelling.rows["first"]
    assert torch.equal(labels, use(None, rows.expand(3, -1)))
    assert len(rows.unique()) == width


@pytest.mark.parametrize(
    "use",
    [
        lambda m, h: h.relu() + h.clamp(0, 1).sqrt(),
        lambda m, h: torch.where(h > 0, h, -h) * 2,
        lambda m, h: torch.zeros_like(h) + h,
        lambda m, h: functional.dropout(h, 0.5),
    ],
)
def test_what_computes_entry_by_entry_keeps_labels(use: Use) -> None:
    labelling, labels = labelling_of(use)
    classes, rows = labelling.classes, labelling.rows["first"]
    assert torch.equal(classes.roots(labels), classes.roots(rows).expand(3, -1))
    assert len(classes.roots(rows).unique()) == 4
    assert all(classes.reason(int(label)) is None for label in rows)


def test_the_halves_of_a_gate_meet() -> None:
    labelling, labels = labelling_of(lambda m, h: functional.glu(torch.cat([h, h], 1), 1).sigmoid(), 4)
    roots = labelling.classes.roots(labelling.rows["first"])
    assert torch.equal(labelling.classes.roots(labels)[0], roots)
    labelling, _ = labelling_of(lambda m, h: torch.cat([functional.glu(h, 1)] * 2, 1), 4)
    roots = labelling.classes.roots(labelling.rows["first"])
    assert torch.equal(roots[:2], roots[2:])
    assert roots[0] != roots[1]


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda m, h: h - h.mean(1, keepdim=True), "mean mixes channels"),
        (lambda m, h: torch.special.i0(h), "operation special_i0 has no rule"),
        (lambda m, h: torch.cat([h[:, :3].max(1, keepdim=True).values, h[:, 1:]], 1), "max mixes channels"),
        (lambda m, h: h * torch.arange(4.0), "is a constant made by arange"),
    ],
)
def test_what_takes_channels_together_freezes_them(use: Use, why: str) -> None:
    labelling, _ = labelling_of(use)
    reasons = {labelling.classes.reason(int(label)) for label in labelling.rows["first"][:3]}
    assert any(why in str(reason) for reason in reasons)


def test_a_mean_over_what_is_the_same_keeps_labels() -> None:
    labelling, labels = labelling_of(lambda m, h: h[:, :, None].expand(-1, -1, 5).mean(2))
    assert torch.equal(labels, labelling.rows["first"].expand(3, -1))
    assert not (labels == NO_CHANNEL).any()
