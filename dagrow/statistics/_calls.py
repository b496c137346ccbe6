"""What several calls of the model in one step leave: two views of a sample, a target network, a batch in parts.

A sample's rows are those of all calls. Calls of the same sizes are joined along the first dimension, as if the model
had been called once on all of their inputs; those of other sizes, such as small crops beside large ones, are batches of
their own, of the same samples. Calls that no gradient reaches, those of a target network or under ``torch.no_grad``,
do not count: the loss does not say where their outputs should go.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dagrow.errors import GrowthError
from dagrow.statistics._captures import Capture

Calls = Mapping[str, Sequence[Capture]]  #: layer -> what each of its calls left there, in their order


def joined_calls(calls: Calls) -> list[dict[str, Capture]]:
    """Calls of the same sizes as one.

    Args:
        calls: of one batch.

    Returns:
        For each kind of sizes: layer -> what all of its calls left there.

    Raises:
        GrowthError: layers were called in different numbers, and with several sizes.
    """
    return [{name: _joined(calls[name], ks) for name, ks in each.items()} for each in _alike(calls)]


def _alike(calls: Calls) -> list[dict[str, Sequence[int]]]:
    """For each kind of sizes: layer -> which of its calls."""
    counts = {name: len(captures) for name, captures in calls.items()}
    first = next(iter(counts.values()), 1)
    if set(counts.values()) <= {1}:
        return [dict.fromkeys(calls, (0,))]
    if set(counts.values()) == {first}:  # the whole model, so often
        seen = [k for k in range(first) if any(captures[k].seen for captures in calls.values())]
        by_sizes: dict[tuple, list[int]] = defaultdict(list)
        for k in seen or range(first):
            by_sizes[tuple(captures[k].sizes for captures in calls.values())].append(k)
        return [dict.fromkeys(calls, ks) for ks in by_sizes.values()]
    chosen: dict[str, Sequence[int]] = {}
    for name, captures in calls.items():
        chosen[name] = [k for k, each in enumerate(captures) if each.seen] or range(len(captures))
        if len({captures[k].sizes for k in chosen[name]}) > 1:
            told = ", ".join(f"{layer} {count}" for layer, count in counts.items())
            raise GrowthError(
                f"layers were called in different numbers in a step ({told}), and {name} on inputs of several sizes, "
                "so which of their calls belong together cannot be told. Call the whole model as often as needed, "
                "rather than its parts."
            )
    return [chosen]


def _joined(calls: Sequence[Capture], runs: Sequence[int]) -> Capture:
    """Some calls, one after another along the first dimension."""
    return calls[0] if len(calls) == 1 else replace(Capture.joined([calls[run] for run in runs]), runs=tuple(runs))
