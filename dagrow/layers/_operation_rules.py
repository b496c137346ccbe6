"""Rules for operations of one's own: functions, methods and modules that dagrow does not know."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import fx, nn

from dagrow.errors import TraceError

Kind = Literal["pointwise", "moves"]


@dataclass(frozen=True)
class OperationRule:
    """What an operation does to channels. A value; hand it to ``dagrow.trace(rules=...)``.

    Args:
        targets: functions as forward calls them (``torch.special.i0``, ``torch.ops.mylib.swish``), names of methods of
            tensors, or module classes.
        kind: ``"pointwise"``, entry by entry of its tensors after broadcasting, in the same way for each channel; or
            ``"moves"``, entries are moved, repeated or dropped but never computed with: it is run on whole numbers.

    Raises:
        TraceError: the kind is another one, or targets are no tuple of such.
    """

    targets: tuple[Any, ...]
    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise TraceError(f"OperationRule(kind={self.kind!r}) is neither 'pointwise' nor 'moves'.")
        wrong = [target for target in self.targets if not (callable(target) or isinstance(target, str))]
        if wrong or not isinstance(self.targets, tuple):
            raise TraceError(
                f"OperationRule(targets={self.targets!r}): give a tuple of functions, of methods' names or of classes."
            )

    def covers(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether the rule speaks for a node of the graph.

        Args:
            node: of any kind.
            module: that the node calls, if it calls one.

        Returns:
            Whether it is one of the targets.
        """
        if module is not None:
            return type(module) in self.targets
        return any(node.target is target or node.target == target for target in self.targets)
