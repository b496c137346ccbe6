"""What growth costs: CPU time over plain forward and backward passes of the same batches, and memory.

    python tests/benchmarks/cost.py --out cost.jsonl [--table docs/measurements.md] [--only mlp/propose mlp/grow]

One thread. Each line runs in a process of its own, side by side with plain passes: medians of ratios over repeats.
Memory is the peak of that process over the peak of one that makes plain passes only. Needs torchvision, and
transformers for BERT and GPT-2. Results of other versions of the sources stay in the file; the table has the newest
of each line.
"""

import argparse
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import append, in_own_process, read, source_version, table, write_block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, Operator

SCRIPT, PLAIN = "tests/benchmarks/cost.py", "plain"
NEURONS = AddNeurons(k=8)
Work = Callable[[dagrow.Dag, "Case"], object]


@dataclass(frozen=True)
class Case:
    """A model, its batches, and what is asked of it.

    Attributes:
        title: what the table calls it.
        build: the model.
        batch: makes one.
        batches: how many.
        works: name -> what is measured, and the number of plain passes that it may take.
        repeats: how often it runs; dear ones less often.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    batches: int
    works: dict[str, tuple[Work, float]]
    repeats: int = 3

    @cached_property
    def data(self) -> list[Any]:
        """The batches."""
        return [self.batch() for _ in range(self.batches)]


def step(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy, of what the model returns or says itself."""
    if isinstance(batch, dict):
        return model(**batch).loss
    inputs, target = batch
    return cross_entropy(model(inputs), target)


def look(dag: dagrow.Dag, case: Case) -> object:
    """Bottlenecks of all edges."""
    return dagrow.bottlenecks(dag, case.data, step=step, progress=False)


def propose(operator: Operator, dag: dagrow.Dag, case: Case) -> object:
    """All places of an operator."""
    return dagrow.propose(dag, case.data, step=step, operators=[operator], progress=False)


def grow(operator: Operator, dag: dagrow.Dag, case: Case) -> object:
    """One growth, applied; undone outside of the time."""
    return dagrow.grow(dag, case.data, step=step, operators=[operator], progress=False)


def five(dag: dagrow.Dag, case: Case) -> object:
    """Five axes, spread over the model."""
    names = [axis.name for axis in dag.axes if "optimal" in axis.inits]
    chosen = [names[round(i * (len(names) - 1) / 4)] for i in range(5)]
    return propose(AddNeurons(k=8, axes=tuple(dict.fromkeys(chosen))), dag, case)


def one(axis: str) -> Work:
    """One axis."""
    return partial(propose, AddNeurons(k=8, axes=(axis,)))


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def vectors(batch: int, width: int, classes: int) -> Any:
    """Inputs, and classes that depend on them."""
    inputs = torch.randn(batch, width)
    return inputs, inputs[:, : min(classes, width)].argmax(1)


def images(batch: int, size: int, classes: int) -> Any:
    """Images, and classes that depend on their means."""
    inputs = torch.randn(batch, 3, size, size)
    return inputs, (inputs.mean((1, 2, 3)) * size * classes).long().abs() % classes


def vision(name: str, **options: Any) -> nn.Module:
    """A model of torchvision, by name."""
    import torchvision

    return getattr(torchvision.models, name)(weights=None, **options)


def vit(width: int, heads: int) -> nn.Module:
    """A vision transformer with patches of 16 pixels."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=heads, hidden_dim=width, mlp_dim=4 * width
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision begins with zero, which leaves nothing to look for
    return model


def language(kind: str) -> nn.Module:
    """BERT-base or GPT-2 small from their configurations, with a head of 50,257 outputs."""
    import transformers

    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50257))


def tokens(batch: int, length: int) -> Any:
    """Random tokens, and the same as labels."""
    ids = torch.randint(50257, (batch, length))
    return {"input_ids": ids, "labels": ids}


class UNet(nn.Module):
    """Four times down and up, two convolutions each: 7.8 million parameters with a base of 32."""

    def __init__(self, base: int = 32) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(5)]
        self.down = nn.ModuleList(self._double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[-2::-1])
        self.mix = nn.ModuleList(self._double(2 * w, w) for w in widths[-2::-1])
        self.head = nn.Conv2d(base, 10, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Module:
        parts: list[nn.Module] = []
        for width in (inputs, outputs):
            parts += [nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, mix, skip in zip(self.up, self.mix, skips[-2::-1], strict=True):
            x = mix(torch.cat([up(x), skip], 1))
        return self.head(x).mean((2, 3))


CONVS = [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
RESNET_AXES = [f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2)]
RESNET_STREAMS = {
    "stream of layer1": "conv1+layer1.0.conv2+layer1.1.conv2",
    **{f"stream of layer{n}": f"layer{n}.0.conv2+layer{n}.0.downsample.0+layer{n}.1.conv2" for n in range(2, 5)},
}
ALL: Work = partial(propose, NEURONS)
CASES = {
    "mlp": Case(
        "MLP 784-512-512-10, 4,096 samples",
        partial(mlp, 784, 512, 512, 10),
        partial(vectors, 256, 784, 10),
        16,
        {"bottlenecks": (look, 1.5), "propose": (ALL, 3), "grow": (partial(grow, NEURONS), 4)},
        7,
    ),
    "convs": Case(
        "convolutions 64-64-64 at 16 x 16, 256 images",
        lambda: nn.Sequential(*CONVS, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        lambda: (torch.randn(64, 64, 16, 16), torch.randint(10, (64,))),
        4,
        {"bottlenecks": (look, 2), "propose": (one("0"), 4)},
        5,
    ),
    "wide": Case(
        "MLP 4096-4096-4096-1000, 4,096 samples",
        partial(mlp, 4096, 4096, 4096, 1000),
        partial(vectors, 256, 4096, 1000),
        16,
        {"bottlenecks": (look, 2), "propose": (ALL, 4)},
    ),
    "resnet18": Case(
        "ResNet-18 at 64 px, 256 images",
        partial(vision, "resnet18", num_classes=100),
        partial(images, 64, 64, 100),
        4,
        {
            "bottlenecks": (look, 2),
            **{axis: (one(axis), 3) for axis in RESNET_AXES},
            **{name: (one(axis), 3) for name, axis in RESNET_STREAMS.items()},
            "all axes": (ALL, 6),
            "grow": (partial(grow, NEURONS), 8),
            "AddConnection()": (partial(propose, AddConnection()), 15),
            "AddLayer(16, ReLU)": (partial(propose, AddLayer(16, nn.ReLU())), 15),
        },
    ),
    "unet": Case(
        "U-Net, 7.8M parameters, 8 images of 128 px",
        UNet,
        partial(images, 8, 128, 10),
        1,
        {"bottlenecks": (look, 2.5), "all axes": (ALL, 8)},
    ),
    "resnet50": Case(
        "ResNet-50 at 128 px, 64 images",
        partial(vision, "resnet50", num_classes=100),
        partial(images, 16, 128, 100),
        4,
        {"five axes": (five, 4)},
    ),
    "convnext": Case(
        "ConvNeXt-T at 128 px, 64 images",
        partial(vision, "convnext_tiny", num_classes=100),
        partial(images, 16, 128, 100),
        4,
        {"five axes": (five, 4)},
    ),
    "vit_s": Case(
        "ViT-S at 224 px, 16 images", partial(vit, 384, 6), partial(images, 16, 224, 1000), 1, {"five axes": (five, 4)}
    ),
    "vit_ti": Case(
        "ViT-Ti at 224 px, 16 images", partial(vit, 192, 3), partial(images, 16, 224, 1000), 1, {"all axes": (ALL, 6)}
    ),
    "vgg11": Case(
        "VGG-11 at 224 px, 32 images",
        partial(vision, "vgg11"),
        partial(images, 16, 224, 1000),
        2,
        {"classifier.0": (one("classifier.0"), 3)},
    ),
    "bert": Case(
        "BERT-base, 8 batches of 4 x 128 tokens",
        partial(language, "bert"),
        partial(tokens, 4, 128),
        8,
        {"bottlenecks": (look, 2), "five axes": (five, 4)},
    ),
    "gpt2": Case(
        "GPT-2 small, 8 batches of 4 x 128 tokens",
        partial(language, "gpt2"),
        partial(tokens, 4, 128),
        8,
        {"bottlenecks": (look, 2), "five axes": (five, 4)},
    ),
}


def seconds(function: Callable[[], object]) -> float:
    """CPU time of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def alone(name: str, what: str, repeats: int | None) -> dict[str, Any]:
    """One line, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[name]
    model = case.build().eval()

    def plain() -> None:
        for batch in case.data:
            step(model, batch).backward()
            model.zero_grad()

    plain()
    if what == PLAIN:
        plain()
        return {"peak": peak()}
    first = case.data[0]
    dag = dagrow.trace(model, first if isinstance(first, dict) else first[0])
    ratios, spent = [], []
    for _ in range(repeats or case.repeats):
        before = seconds(plain)
        start = time.process_time()
        result = case.works[what][0](dag, case)
        spent.append(time.process_time() - start)
        ratios.append(2 * spent[-1] / (before + seconds(plain)))
        if isinstance(result, dagrow.Receipt) and result.parts:
            result.undo()
    return {"passes": ratios, "seconds": spent, "peak": peak()}


def peak() -> float:
    """The largest memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(out: Path, wanted: Sequence[str], repeats: int | None, limit: float) -> None:
    """Runs lines, each in a process of its own, and adds them to a file."""
    peaks: dict[str, float] = {}
    for line in wanted:
        name, what = line.split("/")
        options = ["--repeats", str(repeats)] if repeats else []
        if name not in peaks:
            found, _ = in_own_process([__file__, "--alone", name, PLAIN], limit, "failure")
            peaks[name] = found.get("peak", float("nan"))
        result, _ = in_own_process([__file__, "--alone", name, what, *options], limit, "failure")
        result |= {"case": name, "what": what, "version": source_version(), "plain_peak": peaks[name]}
        append(out, result)
        ratio = statistics.median(result["passes"]) if result.get("passes") else float("nan")
        memory = result.get("peak", float("nan")) / peaks[name]
        print(f"{line}: {ratio:.2f} passes, memory {memory:.2f}, {result.get('failure', '')}", flush=True)


def report(runs: Sequence[dict[str, Any]]) -> str:
    """The newest of each line as a table."""
    newest = {(run["case"], run["what"]): run for run in runs}
    rows = []
    for name, case in CASES.items():
        for what, (_, bound) in case.works.items():
            found = newest.get((name, what))
            if found is None:
                continue
            ratios = sorted(found.get("passes", ()))
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else "-"
            memory = f"{found['peak'] / found['plain_peak']:.2f}" if "peak" in found else found.get("failure", "")[:60]
            rows.append([case.title, what, spread, f"{bound:g}", memory])
    return table(["model, data", "what", "plain passes", "aim", "memory / plain"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results, one JSON object a line")
    parser.add_argument("--table", type=Path, help="document to write the table into")
    parser.add_argument("--only", nargs="*", metavar="CASE/WHAT", help="these lines; all by default")
    parser.add_argument("--repeats", type=int, help="of each line")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each line")
    parser.add_argument("--alone", nargs=2, metavar=("CASE", "WHAT"), help="one line, in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(*arguments.alone, arguments.repeats)))
        return
    every = [f"{name}/{what}" for name, case in CASES.items() for what in case.works]
    wanted = arguments.only if arguments.only is not None else every
    run(arguments.out, wanted, arguments.repeats, arguments.limit)
    if arguments.table is not None:
        write_block(arguments.table, SCRIPT, report(read(arguments.out)))


if __name__ == "__main__":
    main()
