"""TODO layers."""

from dagrow.layers._contractions import ATTENTION, ATTENTION_ARGUMENTS, Contraction, contraction
from dagrow.layers._convolutions import BlockConvolutionRule, GroupedRule
from dagrow.layers._defaults import DEFAULT_RULES
from dagrow.layers._functional_layers import UNIT_DIM_OPS, parameter_of
from dagrow.layers._geometry import Geometry, weight_gradient
from dagrow.layers._linear import LinearRule, Product
from dagrow.layers._op_tables import (
    CREATION,
    CUTS,
    MODES,
    MOVES,
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
from dagrow.layers._sites import LayerSite, layer_sites
from dagrow.layers._spatial_ops import Tables, tables_of

__all__ = [
    "ATTENTION",
    "ATTENTION_ARGUMENTS",
    "CREATION",
    "CUTS",
    "DEFAULT_RULES",
    "MODES",
    "MOVES",
    "PAIRWISE",
    "POINTWISE",
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
    "reduced_dims",
    "rule_for",
    "tables_of",
    "weight_gradient",
    "with_constant",
]
