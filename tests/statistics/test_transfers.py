"""How often numbers leave the device that a model is on: few times a batch, however large it is."""

import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import dagrow

WAITING = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "aten._unique2.default")
MOST = 4  #: a batch, in all passes of a call


class Waits(TorchDispatchMode):
    """Counts what passes on an accelerator wait for: results that Python looks at while statistics are measured."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        if str(function) in WAITING:
            files = [Path(frame.filename).parts for frame in traceback.extract_stack()]
            innermost = next(parts for parts in reversed(files) if "dagrow" in parts and "tests" not in parts)
            self.counts[str(function)] += bool({"statistics", "layers"} & {*innermost})
        return function(*args, **(kwargs or {}))


def network() -> nn.Module:
    convolutions = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.Sequential(*convolutions, *head).eval()


def waits(call: Callable, batches: int) -> int:
    """In a call on some batches."""
    torch.manual_seed(0)
    model = network()
    data = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(batches)]
    dag = dagrow.trace(model, data[0][0])
    with Waits() as found:
        call(dag, data, cross_entropy, progress=False)
    return found.counts.total()


@pytest.mark.parametrize(
    "call",
    [
        dagrow.bottlenecks,
        lambda *args, **options: dagrow.propose(*args, operators=[dagrow.AddNeurons(k=2)], **options),
        lambda *args, **options: dagrow.propose(*args, operators=[dagrow.AddConnection()], **options),
    ],
    ids=["bottlenecks", "neurons", "connections"],
)
def test_a_batch_more_is_waited_for_a_few_times(call: Callable) -> None:
    few, many = waits(call, 8), waits(call, 16)
    assert 8 <= many - few <= 8 * MOST
