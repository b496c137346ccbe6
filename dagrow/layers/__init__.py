"""What dagrow knows of layer types and operations: one rule a type of layer, tables of torch's operations.

A rule takes a module and tensors that went in or came out, and gives rows of features, widths, or entries for new
channels; it knows no graph. For a layer of your own, subclass :class:`EdgeRule` if the layer mixes channels by a weight
(it is brought to the normal form ``a = W b``), :class:`RiderRule` if it has entries of its own for each channel;
:class:`OperationRule` is for operations that dagrow does not know. Hand them to ``dagrow.trace(rules=...)``.

>>> from dataclasses import dataclass
>>> import dagrow, torch
>>> from dagrow.layers import RiderRule
>>> class Scale(torch.nn.Module):
...     def __init__(self, width):
...         super().__init__()
...         self.width, self.weight = width, torch.nn.Parameter(torch.ones(width))
...
...     def forward(self, x):
...         return torch.special.i0(x) * self.weight  # special.i0 has no rule
>>> @dataclass(frozen=True)
... class ScaleRule(RiderRule):
...     types = (Scale,)
...
...     def channel_dim(self, ndim):
...         return ndim - 1
...
...     def attributes(self, module, width):
...         return {"width": width}
...
...     def passing(self, module):
...         return {"weight": torch.ones(())}
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), Scale(4), torch.nn.Linear(4, 2))
>>> dagrow.trace(model, torch.ones(5, 3)).axis("0").growable
False
>>> dagrow.trace(model, torch.ones(5, 3), rules=[ScaleRule()]).axis("0").growable
True
"""

from dagrow.layers._contractions import ATTENTION, ATTENTION_ARGUMENTS, Contraction, contraction
from dagrow.layers._convolutions import CONVOLUTIONS, GROUPED, BlockConvolutionRule, GroupedRule
from dagrow.layers._functional_layers import UNIT_DIM_OPS, parameter_of
from dagrow.layers._geometry import Geometry, weight_gradient
from dagrow.layers._linear import LINEAR, PRODUCTS, LinearRule, Product
from dagrow.layers._norms import BATCH_NORMS, GROUP_NORM, INSTANCE_NORMS, PRELU
from dagrow.layers._op_tables import (
    CUTS,
    MODES,
    MOVES,
    NOISE,
    PAIRWISE,
    POINTWISE,
    REDUCTIONS,
    REFUSALS,
    SIZES,
    UNIFORM,
    ZERO_KEEPING,
    binds,
    executor,
    is_move_module,
    is_pointwise_module,
    keeps_zero,
    mixed_dims,
    neutral_entries,
    op_name,
    reduced_dims,
)
from dagrow.layers._operation_rules import OperationRule
from dagrow.layers._rules import EdgeRule, LayerRule, RiderRule, rule_for, with_constant
from dagrow.layers._sites import LayerSite, layer_sites, parameter_products
from dagrow.layers._spatial_ops import Tables, tables_of
from dagrow.layers._taken_together import PICKS, PUTS, taken_dims

#: one rule for each type of layer that dagrow knows
DEFAULT_RULES: tuple[LayerRule, ...] = (
    *(LINEAR, *PRODUCTS, *CONVOLUTIONS, *GROUPED),
    *(BATCH_NORMS, *INSTANCE_NORMS, GROUP_NORM, PRELU),
)

__all__ = [
    "ATTENTION",
    "ATTENTION_ARGUMENTS",
    "CUTS",
    "DEFAULT_RULES",
    "MODES",
    "MOVES",
    "NOISE",
    "PAIRWISE",
    "PICKS",
    "POINTWISE",
    "PUTS",
    "REDUCTIONS",
    "REFUSALS",
    "SIZES",
    "UNIFORM",
    "UNIT_DIM_OPS",
    "ZERO_KEEPING",
    "BlockConvolutionRule",
    "Contraction",
    "EdgeRule",
    "Geometry",
    "GroupedRule",
    "LayerRule",
    "LayerSite",
    "LinearRule",
    "OperationRule",
    "Product",
    "RiderRule",
    "Tables",
    "binds",
    "contraction",
    "executor",
    "is_move_module",
    "is_pointwise_module",
    "keeps_zero",
    "layer_sites",
    "mixed_dims",
    "neutral_entries",
    "op_name",
    "parameter_of",
    "parameter_products",
    "reduced_dims",
    "rule_for",
    "tables_of",
    "taken_dims",
    "weight_gradient",
    "with_constant",
]
