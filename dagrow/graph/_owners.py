"""Owners of parameters outside a model that go on with the old ones: wrappers for several processes."""

import gc
from collections.abc import Collection, Iterator
from warnings import warn

import torch
from torch import Tensor, nn

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

    Warns where several processes run or share its memory, each of which would have to grow a model of its own.

    Args:
        model: whose parameters are to become others.

    Raises:
        GrowthError: a wrapper is bound to them, or a tensor holds several of them.
    """
    _check_memory(model)
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


def _check_memory(model: nn.Module) -> None:
    """No larger tensor, and no other process, goes on with the memory of the parameters."""
    parameters = dict(model.named_parameters())
    if any(p.device.type == "cpu" and p.is_shared() for p in parameters.values()):
        warn(
            "the model is in memory that processes share, and a parameter that grows moves to other memory. Processes "
            "that have the model already go on with the old one: start them after growing.",
            stacklevel=3,
        )
    parts = {name: parameter for name, parameter in parameters.items() if _is_part(parameter)}
    for tensor in (found for found in gc.get_objects() if type(found) is Tensor) if parts else ():
        name = next((name for name, parameter in parts.items() if _holds(tensor, parameter)), None)
        if name is not None:
            raise GrowthError(
                f"{name} is a part of a tensor of shape {tuple(tensor.shape)}, which would go on with what it was. "
                "Delete that tensor, or give each parameter memory of its own: parameter.data = parameter.data.clone()."
            )


def _memory(tensor: Tensor) -> int:
    """Where the memory that a tensor lies in begins; 0 without any."""
    plain = tensor.layout is torch.strided and tensor.device.type != "meta"
    return tensor.untyped_storage().data_ptr() if plain else 0


def _is_part(parameter: Tensor) -> bool:
    """Whether the memory of a parameter is larger than it."""
    size = parameter.numel() * parameter.element_size()
    return bool(_memory(parameter)) and parameter.untyped_storage().nbytes() > size


def _holds(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter is a part of a larger tensor."""
    if tensor.numel() <= parameter.numel() or _memory(tensor) != _memory(parameter):
        return False
    first = parameter.storage_offset() - tensor.storage_offset()
    return 0 <= first <= tensor.numel() - parameter.numel()


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
