"""A model and the random generators, left as they were found, whatever happens inside a ``with``."""

import collections
import contextlib
import functools
import operator
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
_GENERATOR = threading.RLock()
FAKE = torch._C._TorchDispatchModeKey.FAKE
_PLAIN = frozenset((bool, int, float, str, type(None)))
_CONTAINERS = frozenset((dict, collections.OrderedDict, list, set, collections.deque))
_USUAL = frozenset((*_PLAIN, *_CONTAINERS, tuple))  #: what most attributes of modules are


@contextlib.contextmanager
def all_or_nothing(restore: Callable[[], object]) -> Iterator[None]:
    """What is done inside is done to its end, or ``restore`` puts back what was found, whatever the reason.

    Args:
        restore: may run twice: where an interrupt stops it, it is run again before the interrupt goes on.
    """
    try:
        yield
    except BaseException:
        try:
            restore()
        except BaseException:  # an interrupt while cleaning up: finish the cleaning first
            restore()
            raise
        raise


@contextlib.contextmanager
def restoring(restore: Callable[[], object]) -> Iterator[None]:
    """``restore`` puts back what was found at the end, whatever happens inside. It may run twice."""
    with all_or_nothing(restore):
        yield
        restore()


@dataclass(eq=False)
class Others:
    """Modules that run beside a model, a head or a metric.

    Attributes:
        modules: those that were seen.
        complete: whether others need not be looked for any more.
    """

    modules: list[nn.Module] = field(default_factory=list)
    complete: bool = False


@contextlib.contextmanager
def preserve_state(model: nn.Module, others: Others | None = None, *, weights: bool = False) -> Iterator[None]:
    """Leaves a model and the random generators as they were, whatever happens inside. See :class:`ModelState`.

    Gradients are None inside, as something there may run backward. Modules that were compiled in place run as they are
    written, so that hooks see their layers. Modules that run beside the model are left as they were, too.
    """
    state, others = ModelState(model, weights=weights), others or Others()
    for module in others.modules:
        state.include(module)
    with state.kept(), contextlib.nullcontext() if others.complete else _looking_for(others, state):
        for module in model.modules():
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = None
        state.drop_gradients()
        yield


@contextlib.contextmanager
def _looking_for(others: Others, state: "ModelState") -> Iterator[None]:
    """Inside, modules outside the model that this thread calls become part of a state."""
    thread = threading.get_ident()

    def include(module: nn.Module, _args: object) -> None:
        new = id(module) not in state.modules and threading.get_ident() == thread
        if new and torch._C._get_dispatch_mode(FAKE) is None:
            with torch._C.DisableTorchFunction():
                state.include(module)
                state.drop_gradients()
            others.modules.append(module)

    handle = register_module_forward_pre_hook(include)
    with restoring(handle.remove):
        yield


def rewinding(others: Others) -> Callable[[], None]:
    """What brings buffers of modules beside a model, such as a running mean, back to what they are now."""
    found = [
        (module._buffers, name, buffer, buffer._version, buffer.detach().clone())
        for module in others.modules
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]

    def rewind() -> None:
        for buffers, name, buffer, version, value in found:
            buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)

    return rewind


@contextlib.contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, tensors stand where the model's own of these names do; nothing is written into those."""
    originals: list[tuple[dict[str, Any], str, Tensor]] = []

    def restore() -> None:
        for holder, leaf, tensor in reversed(originals):
            holder[leaf] = tensor

    with restoring(restore):
        for name, tensor in tensors.items():
            path, _, leaf = name.removeprefix(".").rpartition(".")
            module = model.get_submodule(path)
            holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            holder = next(holder for holder in holders if leaf in holder)
            originals.append((holder, leaf, holder[leaf]))
            if tensor.is_leaf and not tensor.is_inference():  # a step may ask which parameters are trainable
                tensor = tensor.detach().requires_grad_(holder[leaf].requires_grad)
            holder[leaf] = tensor
        yield


class ModelState:
    """A model and the random generators as they are when it is made, to come back to, and modules included later.

    Of the model: its class, every attribute of every module (modes, hooks, caches in containers), and of every
    parameter, buffer and other tensor there the gradient, ``requires_grad`` and the values.

    Of torch: whether gradients are enabled, and the modes under which functions run.

    Args:
        weights: whether values of parameters are copied too; otherwise nothing inside may write them.
    """

    def __init__(self, model: nn.Module, *, weights: bool = False) -> None:
        self.model, self.kind = model, type(model)
        self.trusting = False
        self.modules: dict[int, nn.Module] = {}
        self.contents: list[tuple[Any, Any]] = []
        self.tensors: list[_TensorState] = []
        self.generators = random_state()
        self.grad = torch.is_grad_enabled()
        self.modes, self.fake = torch._C._len_torch_function_stack(), torch._C._get_dispatch_mode(FAKE)
        self.include(model, weights=weights)

    def include(self, module: nn.Module, *, weights: bool = False) -> None:
        """Comes back to another module too, as it is now.

        Args:
            module: with all its parts; what is known of it already stays so.
            weights: as for the model.
        """
        containers: dict[int, Any] = {}
        tensors: dict[int, Tensor] = {}
        modules = [part for part in module.modules() if id(part) not in self.modules]
        for part in modules:
            _collect(vars(part), containers, tensors)
        self.contents += [(container, container.copy()) for container in containers.values()]
        self.tensors += [
            _TensorState.of(tensor, weights or not isinstance(tensor, nn.Parameter)) for tensor in tensors.values()
        ]
        unusual = (value for part in modules for value in vars(part).values() if type(value) not in _USUAL)
        self.generators += [(v.set_state, v.get_state()) for v in unusual if isinstance(v, torch.Generator)]
        self.modules |= {id(part): part for part in modules}

    def drop_gradients(self) -> None:
        """Makes all gradients None, for what is to run backward inside."""
        for saved in self.tensors:
            if saved.grad is not None and saved.tensor.grad is saved.grad:
                saved.tensor.grad = None

    def trusted(self, function: Callable[[], T]) -> T:
        """Runs a function that comes back here more than once.

        Values are compared once, at its end: before that, a parameter counts as unwritten while its version does. If
        one was written past its version, as through ``.data``, the function runs once more, all values compared.

        Args:
            function: uses :meth:`kept`.

        Returns:
            What the function gives.
        """
        unnoticed: list[Tensor] = []

        def compare() -> None:
            self.trusting = False
            unnoticed.extend(saved.tensor for saved in self.tensors if saved.unwritten and saved.changed)
            if unnoticed:
                self.restore()

        try:
            with restoring(compare):
                self.trusting = True
                result = function()
        except Exception:
            if not unnoticed:
                raise
        return function() if unnoticed else result

    def kept(self) -> contextlib.AbstractContextManager[None]:
        """Leaves everything as it was found, whatever happens inside."""
        return restoring(self.restore)

    def restore(self) -> None:
        """Puts everything back. May run twice."""
        while torch._C._len_torch_function_stack() > self.modes:  # an interrupt kept a mode from leaving
            torch._C._pop_torch_function_stack()
        if torch._C._get_dispatch_mode(FAKE) is not self.fake:
            torch._C._unset_dispatch_mode(FAKE)
            if self.fake is not None:
                torch._C._set_dispatch_mode(self.fake)
        torch.set_grad_enabled(self.grad)
        self.model.__class__ = self.kind
        for container, content in self.contents:
            if container or content:
                _refill(container, content)
        for saved in self.tensors:
            saved.restore(self.trusting)
        for setter, state in self.generators:
            setter(state)


def _collect(value: Any, containers: dict[int, Any], tensors: dict[int, Tensor]) -> None:
    """Notes the containers and tensors in a nest of containers."""
    if type(value) not in _CONTAINERS:
        if isinstance(value, Tensor):
            tensors[id(value)] = value
    elif id(value) not in containers:
        containers[id(value)] = value
        for child in list(value.values() if isinstance(value, dict) else value):
            if type(child) not in _PLAIN:
                _collect(child, containers, tensors)


def _refill(container: Any, content: Any) -> None:
    """Gives a container its old content back, in its old order."""
    same = len(container) == len(content) and all(map(operator.is_, container, content))
    if same and isinstance(container, dict):
        same = all(map(operator.is_, container.values(), content.values()))
    if same:
        return
    container.clear()
    (container.extend if hasattr(container, "extend") else container.update)(content)


@dataclass(frozen=True)
class _TensorState:
    tensor: Tensor
    data: Tensor
    solid: bool  #: whether it has a storage of its own, to be put back
    values: Tensor | None
    requires_grad: bool
    grad: Tensor | None
    version: int | None  #: of a parameter

    @staticmethod
    def of(tensor: Tensor, copied: bool) -> "_TensorState":
        """A tensor as it is; with its values if they are to be ``copied``."""
        solid = tensor.layout is torch.strided and not tensor.is_meta and not isinstance(tensor, FakeTensor)
        values = tensor.detach().clone() if copied and solid else None
        grad = tensor.grad if tensor.is_leaf else None
        version = tensor._version if isinstance(tensor, nn.Parameter) and not tensor.is_inference() else None
        return _TensorState(tensor, tensor.detach(), solid, values, tensor.requires_grad, grad, version)

    @property
    def unwritten(self) -> bool:
        """Whether a parameter has the version that it had."""
        return self.version is not None and self.tensor._version == self.version

    @property
    def changed(self) -> bool:
        """Whether its values, copied before, are others now."""
        return self.values is not None and not torch.equal(self.tensor, self.values)

    def restore(self, trusting: bool = False) -> None:
        """Writes back only what has changed: a write would break the backward of a loss still alive."""
        tensor = self.tensor
        if self.solid:
            if tensor.data_ptr() != self.data.data_ptr() or tensor.shape != self.data.shape:
                tensor.data = self.data
            if self.values is not None and not (trusting and self.unwritten) and self.changed:
                with torch.no_grad():
                    tensor.copy_(self.values)
        if not tensor.is_leaf:
            return
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if tensor.grad is not self.grad:
            tensor.grad = self.grad


def _alone(function: Callable[..., T]) -> Callable[..., T]:
    """Lets one thread of ours in at a time.

    Torch locks a generator while it is read. If garbage is collected meanwhile, other threads run, and one that seeds
    the generator waits for that lock with the interpreter's own in its hands: neither ever goes on.

    Args:
        function: reads the generator, or seeds it.

    Returns:
        The same, behind a lock of ours, which is waited for without the interpreter's.
    """

    @functools.wraps(function)
    def call(*args: Any) -> T:
        with _GENERATOR:
            return function(*args)

    return call


torch_state = _alone(torch.get_rng_state)
_set_torch_state = _alone(torch.set_rng_state)
_seed_torch = _alone(torch.default_generator.manual_seed)


def random_state() -> list[tuple[Callable[[Any], Any], Any]]:
    """What sets each random generator that all share, and its state.

    Returns:
        Functions, and what to call them with to come back to the present.
    """
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (_set_torch_state, torch_state()),
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
    ]
    if torch.cuda.is_initialized():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return states


def seed_everything(seed: int, *, others: bool = True) -> None:
    """Seeds the global random generators, of torch, numpy and Python. Inside :func:`preserve_state`.

    Args:
        seed: any whole number from 0 on.
        others: whether those of numpy and Python, too.
    """
    _seed_torch(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if others:
        random.seed(seed)
        np.random.seed(seed % 2**32)


def drawn_so_far() -> tuple[tuple[object, ...], tuple[object, ...]]:
    """What tells whether anything is drawn between two calls: from torch's generators, and from numpy and Python's."""
    numpy_state: Any = np.random.get_state()
    _, keys, position, *gauss = numpy_state
    tensors = [torch_state()]
    if torch.cuda.is_initialized():
        tensors += torch.cuda.get_rng_state_all()
    of_torch = tuple(crc32(tensor.numpy().tobytes()) for tensor in tensors)
    return of_torch, (crc32(keys.tobytes()), position, *gauss, random.getstate())


class NoDropout(TorchFunctionMode):
    """Inside, dropout passes everything on, in attention too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args, kwargs = args[:4], {**dict(zip(("dropout_p", "is_causal"), args[4:], strict=False)), **kwargs}
            kwargs["dropout_p"] = 0.0
        if func is functional.multi_head_attention_forward:
            call = signature(func).bind(*args, **kwargs)
            call.arguments["dropout_p"] = 0.0
            args, kwargs = call.args, call.kwargs
        return func(*args, **kwargs)
