"""Owners of parameters outside a model that go on with the old ones: wrappers for several processes."""

import gc
from collections.abc import Collection, Iterator
from warnings import warn

import torch
from torch import nn

from dagrow.errors import GrowthError, TraceError

#: wrappers that bind to the parameters they find, of torch and of others, by their names
_WRAPPERS = frozenset(("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"))
_RECIPE = (
    "Grow the model before it is wrapped (of a DistributedDataParallel that is wrapper.module, once the wrapper is "
    "deleted), with the same batches and the same seeds in every process; then wrap the grown model."
)


def check_unwrapped(model: nn.Module) -> None:
    """Checks that nothing in a model is bound to the parameters that are there.

    Args:
        model: any.

    Raises:
        TraceError: it is a wrapper for several processes, holds one, or its parameters are spread over devices.
    """
    wrapped = [type(module).__name__ for module in model.modules() if _wraps(module)]
    if wrapped:
        raise TraceError(
            f"a {wrapped[0]} is bound to the parameters that it was made of; it would go on with those after a growth, "
            f"and processes would train apart. {_RECIPE}"
        )
    spread = [name for name, parameter in model.named_parameters() if _is(parameter, {"DTensor"})]
    if spread:
        raise TraceError(
            f"{spread[0]} is a DTensor, spread over devices, and its layout would not follow a growth. {_RECIPE}"
        )


def check_owners(model: nn.Module) -> None:
    """Checks that the parameters of a model can grow or shrink without others that go on with the old ones.

    Warns where several processes run, each of which grows a model of its own.

    Args:
        model: whose parameters are to become others.

    Raises:
        GrowthError: a wrapper is bound to them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return  # there are no wrappers then
    if any(True for _ in _wrappers(model)):
        gc.collect()  # perhaps nobody holds it any more
    for wrapper in _wrappers(model):
        raise GrowthError(
            f"a {type(wrapper).__name__} holds parameters of this model; it would go on with those that it was made "
            f"of, and processes would train apart. {_RECIPE}"
        )
    processes = torch.distributed.get_world_size()
    if processes > 1:
        warn(
            f"torch.distributed runs {processes} processes, and this one grows its own copy of the model. Grow all "
            "copies alike, with the same batches and the same seeds, or one of them: dagrow.save it, and dagrow.load "
            "it in the others. Else they train apart.",
            stacklevel=2,
        )


def _is(value: object, names: Collection[str]) -> bool:
    """Whether it is of a class of one of these names."""
    return any(kind.__name__ in names for kind in type(value).__mro__)


def _wraps(module: object) -> bool:
    return _is(module, _WRAPPERS)


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Those in this process that hold a module or a parameter of a model."""
    mine = _parts(model)
    modules = (found for found in gc.get_objects() if issubclass(type(found), nn.Module))
    return (wrapper for wrapper in modules if _wraps(wrapper) and mine & _parts(wrapper))


def _parts(module: nn.Module) -> set[int]:
    return {*map(id, module.modules()), *map(id, module.parameters())}
