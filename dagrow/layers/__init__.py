"""What dagrow knows of types of layers, one rule per type."""

from dagrow.layers.base import EdgeRule, LayerRule, RiderRule, rule_for, with_constant
from dagrow.layers.channels import BATCH_NORMS, GROUP_NORM, INSTANCE_NORMS, PRELU
from dagrow.layers.convolutions import CONVOLUTIONS, GROUPED, BlockConvolutionRule, GroupedRule
from dagrow.layers.linear import LINEAR, PRODUCTS, Product
from dagrow.layers.operations import OperationRule

__all__ = [
    "DEFAULT_RULES", "BlockConvolutionRule", "EdgeRule", "GroupedRule", "LayerRule", "OperationRule", "Product",
    "RiderRule", "rule_for", "with_constant",
]  # fmt: skip

DEFAULT_RULES: tuple[LayerRule, ...] = (
    LINEAR, *PRODUCTS, *CONVOLUTIONS, *GROUPED, BATCH_NORMS, *INSTANCE_NORMS, GROUP_NORM, PRELU,
)  # fmt: skip
