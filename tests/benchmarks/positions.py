"""Would it pay to measure only some positions of each image? What that saves, and what it costs in precision.

    python tests/benchmarks/positions.py --mnist DIR --cifar DIR

Every s-th position in each direction, from a random start, gives unbiased sums when they are multiplied by s^2. Their
variance over samples is compared with that of the sums over all positions, at two convolutions of a small CNN after an
epoch of training; and so is the time of one pass, at two 3x3 convolutions 64-64-64 on 16x16 images, one thread. With
few samples more or less the error at equal time would be the same if the product of the two ratios were 1.
"""

import argparse
import statistics
from collections.abc import Iterator

import cnn
import torch
from convolutions import BATCH, SIZE, WIDTH, seconds
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dagrow.layers import Geometry
from dagrow.statistics import patch_gram

STEPS = (2, 3, 4)
SAMPLES = 400


def thinned(step: int) -> Geometry:
    return Geometry((3, 3), (step, step), (1, 1), ((1, 1), (1, 1)))


def seen(kind: str, folder: str, widths: tuple[int, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What convolutions of a CNN read and want, after an epoch."""
    (x, y), _ = cnn.load(kind, folder)
    model = cnn.build(x.shape[1], widths, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=cnn.RATE)
    for inputs, target in zip(x.split(cnn.BATCH), y.split(cnn.BATCH), strict=True):
        optimizer.zero_grad()
        cross_entropy(model(inputs), target).backward()
        optimizer.step()
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("conv2", "conv3"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, inputs, output, name=name: layers.update({name: (inputs[0].detach(), output)})
        )
    loss = cross_entropy(model.eval()(x[:SAMPLES]), y[:SAMPLES], reduction="sum")
    goals = torch.autograd.grad(-loss, [output for _, output in layers.values()])
    for (name, (inputs, _)), goal in zip(layers.items(), goals, strict=True):
        yield f"{kind} {'-'.join(map(str, widths))} {name}", inputs, goal


def variances(inputs: Tensor, goals: Tensor, step: int) -> tuple[float, float]:
    """Of the sums ``b v^T`` and ``b b^T`` over samples, thinned over whole; a mean over all starts."""
    patches = thinned(1).patches(inputs).view(len(inputs), *goals.shape[2:], -1)
    parts = []
    for values in (goals.movedim(1, -1), patches):
        whole = torch.einsum("nhwp,nhwo->npo", patches, values)
        mean, total = whole.mean(0), 0.0
        for start in torch.cartesian_prod(torch.arange(step), torch.arange(step)).tolist():
            places = (slice(None), slice(start[0], None, step), slice(start[1], None, step))
            part = step**2 * torch.einsum("nhwp,nhwo->npo", patches[places], values[places])
            total += float((part - mean).square().sum((1, 2)).mean()) / step**2
        parts.append(total / float((whole - mean).square().sum((1, 2)).mean()))
    return parts[0], parts[1]


def times(step: int, repeats: int = 9) -> float:
    """Of a pass that gathers a Gram and a product with goals, thinned over whole."""
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
    x = torch.randn(BATCH, WIDTH, SIZE, SIZE)

    def forward() -> tuple[Tensor, Tensor]:
        hidden = model[:2](x).detach()
        return hidden, model[2](hidden).detach()

    def whole() -> None:
        hidden, goals = forward()
        patch_gram(hidden, hidden, thinned(1), [[1.0] * SIZE] * 2)
        thinned(1).crossed(hidden, goals)

    def thinned_pass() -> None:
        hidden, goals = forward()
        patches = thinned(step).patches(hidden).flatten(0, 1)
        patches.T @ patches
        thinned(step).crossed(hidden, goals[:, :, ::step, ::step].contiguous())

    whole(), thinned_pass()
    return statistics.median(seconds(thinned_pass) / seconds(whole) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="folder with the four files of MNIST")
    parser.add_argument("--cifar", required=True, help="folder with data_batch_1.bin and a test_batch of CIFAR-10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for step in STEPS:
        print(f"every position in {step**2}: time of a pass {times(step):.2f}")
    for kind, folder in (("mnist", arguments.mnist), ("cifar", arguments.cifar)):
        for widths in (cnn.START, cnn.FINAL):
            for name, inputs, goals in seen(kind, folder, widths):
                for step in STEPS:
                    crossed, gram = variances(inputs, goals, step)
                    print(f"{name}, one in {step**2}: variance with goals {crossed:.2f}, of the Gram {gram:.2f}")


if __name__ == "__main__":
    main()
