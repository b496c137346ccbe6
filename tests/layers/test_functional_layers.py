"""Functions that are called with parameters, and the layers that stand for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dagrow.layers import parameter_of
from dagrow.layers._functional_layers import FunctionalLayer, functional_layers
from dagrow.tracing import record


class Holder(nn.Module):
    """Parameters, and a forward that uses them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.function = forward
        for name, shape in shapes.items():
            if name in ("mean", "var"):
                self.register_buffer(name, torch.rand(shape) + 0.5)
            else:
                setattr(self, name, nn.Parameter(torch.rand(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def layers_of(model: nn.Module, x: Tensor) -> list[FunctionalLayer]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    graph = record(model.eval(), x).graph
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    return [layer for node in calls for layer in functional_layers(node, tensors)]


W, B, K = {"w": (4, 3)}, {"b": (4,)}, {"k": (4, 3, 3, 3)}
STATISTICS = {"w": (3,), "b": (3,), "mean": (3,), "var": (3,)}


@pytest.mark.parametrize(
    ("forward", "shapes", "kind"),
    [
        (lambda m, x: functional.linear(x, m.w, m.b), W | B, "Linear"),
        (lambda m, x: x @ m.w.T, W, "Linear"),
        (lambda m, x: x @ m.w, {"w": (3, 4)}, "Product"),
        (lambda m, x: torch.addmm(m.b, x, m.w), {"w": (3, 4)} | B, "Product"),
        (lambda m, x: m.w @ x.T, W, "Product"),
        (lambda m, x: functional.prelu(x, m.w), {"w": (3,)}, "PReLU"),
        (lambda m, x: functional.group_norm(x, 3, m.w, m.b), {"w": (3,), "b": (3,)}, "GroupNorm"),
        (lambda m, x: functional.batch_norm(x, m.mean, m.var, m.w, m.b), STATISTICS, "BatchNorm2d"),
        (lambda m, x: functional.conv2d(x, m.k, m.b, padding=1), K | B, "Conv2d"),
        (lambda m, x: functional.conv_transpose2d(x, m.k, stride=2), {"k": (3, 4, 2, 2)}, "ConvTranspose2d"),
    ],
)
def test_the_layer_computes_what_the_function_does(
    forward: Callable[[Any, Tensor], Tensor], shapes: dict[str, tuple[int, ...]], kind: str
) -> None:
    torch.manual_seed(0)
    model = Holder(forward, shapes)
    x = torch.rand(5, 3, 6, 6) if kind in ("BatchNorm2d", "Conv2d", "ConvTranspose2d") else torch.rand(5, 3)
    (layer,) = layers_of(model, x)
    assert type(layer.module).__name__ == kind
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert set(layer.paths.values()) == set(tensors)
    assert all(getattr(layer.module, entry) is tensors[path] for entry, path in layer.paths.items())
    inputs = x.T if layer.inputs.name != "x" and x.ndim == 2 else x
    torch.testing.assert_close(layer.module.eval()(inputs), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: functional.linear(x, m.w * 2),  # no parameter itself
        lambda m, x: functional.linear(x, x[:, :3]),
        lambda m, x: x * m.w[:1, 0],
    ],
)
def test_what_is_called_with_no_parameter_is_no_layer(forward: Callable[[Any, Tensor], Tensor]) -> None:
    assert not layers_of(Holder(forward, W), torch.rand(5, 3))


def test_a_parameter_is_known_by_its_transpose() -> None:
    model = Holder(lambda m, x: x @ m.w.t() + m.w[:, :1].sum(), W)
    graph, tensors = record(model, torch.rand(5, 3)).graph, dict(model.named_parameters())
    product = next(node for node in graph.nodes if node.name == "matmul")
    source = parameter_of(product.args[1], tensors)
    assert (source.path, source.turned) == ("w", True)
    assert parameter_of(product.args[0], tensors) is None
