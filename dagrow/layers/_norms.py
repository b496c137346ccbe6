"""Layers with entries of their own for each channel: norms and PReLU.

New channels are calibrated where norms keep statistics, so that they pass unchanged.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dagrow.layers._rules import RiderRule


def _present(module: Any, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the entries that the module has."""
    return {name: entry for name, entry in entries.items() if getattr(module, name, None) is not None}


def _affine_identity(module: Any) -> dict[str, Tensor]:
    return _present(module, {"weight": torch.ones(()), "bias": torch.zeros(())})


@dataclass(frozen=True)
class _TrackingNormRule(RiderRule):
    """A norm that may keep statistics.

    With running mean m, variance s^2, weight sqrt(s^2 + eps) and bias m it is the identity in eval mode.
    """

    def attributes(self, module: nn.Module, width: int) -> dict[str, int]:
        return {"num_features": width}

    def passing(self, module: Any) -> dict[str, Tensor]:
        if module.track_running_stats:
            return self.calibrated(module, *torch.tensor([0.0, 1.0], dtype=torch.float64))
        return _affine_identity(module)

    def calibrated(self, module: Any, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
        if not module.track_running_stats:
            return {}
        deviation = (variance + module.eps).sqrt()
        statistics = {"running_mean": mean, "running_var": variance}
        return _present(module, {"weight": deviation, "bias": mean, **statistics})


@dataclass(frozen=True)
class BatchNormRule(_TrackingNormRule):
    """``nn.BatchNorm1d``, ``nn.BatchNorm2d``, ``nn.BatchNorm3d`` and ``nn.SyncBatchNorm``."""

    types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

    def channel_dim(self, ndim: int) -> int:
        return 1

    def refusal(self, module: Any) -> str | None:
        if not module.affine:
            return "a BatchNorm without affine parameters cannot pass a new channel unchanged"
        if not module.track_running_stats:
            return "a BatchNorm without running statistics mixes the samples of a batch"
        return None


@dataclass(frozen=True)
class InstanceNormRule(_TrackingNormRule):
    """``nn.InstanceNorm1d``, ``nn.InstanceNorm2d`` and ``nn.InstanceNorm3d``, which norm every channel by itself."""

    space: int

    @property
    def types(self) -> tuple[type[nn.Module], ...]:  # type: ignore[override]
        return ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[self.space - 1],)

    def channel_dim(self, ndim: int) -> int:
        return ndim - self.space - 1

    def refusal(self, module: Any) -> str | None:
        if module.track_running_stats and not module.affine:
            return "an InstanceNorm with statistics but no affine parameters cannot pass a new channel unchanged"
        return None


@dataclass(frozen=True)
class GroupNormRule(RiderRule):
    """``nn.GroupNorm``: a group is normed by itself, so that whole groups can be added."""

    types = (nn.GroupNorm,)

    def channel_dim(self, ndim: int) -> int:
        return 1

    def group(self, module: Any) -> tuple[int, int]:
        return (module.num_channels // module.num_groups,) * 2

    def attributes(self, module: Any, width: int) -> dict[str, int]:
        return {"num_channels": width, "num_groups": width // self.group(module)[0]}

    def passing(self, module: Any) -> dict[str, Tensor]:
        return _affine_identity(module)


@dataclass(frozen=True)
class PReLURule(RiderRule):
    """``nn.PReLU`` with a slope for each channel; a new one starts with torch's default."""

    types = (nn.PReLU,)

    def channel_dim(self, ndim: int) -> int:
        return min(1, ndim - 1)

    def covers(self, module: Any) -> bool:
        return module.num_parameters > 1

    def attributes(self, module: nn.Module, width: int) -> dict[str, int]:
        return {"num_parameters": width}

    def passing(self, module: nn.Module) -> dict[str, Tensor]:
        return {"weight": torch.tensor(0.25)}


BATCH_NORMS, GROUP_NORM, PRELU = BatchNormRule(), GroupNormRule(), PReLURule()
INSTANCE_NORMS = tuple(InstanceNormRule(space) for space in (1, 2, 3))
