"""What dagrow knows of types of layers, one rule per type."""

from dagrow.layers._convolutions import CONVOLUTIONS, GROUPED
from dagrow.layers._linear import LINEAR, PRODUCTS
from dagrow.layers._norms import BATCH_NORMS, GROUP_NORM, INSTANCE_NORMS, PRELU
from dagrow.layers._rules import LayerRule

DEFAULT_RULES: tuple[LayerRule, ...] = (
    LINEAR,
    *PRODUCTS,
    *CONVOLUTIONS,
    *GROUPED,
    BATCH_NORMS,
    *INSTANCE_NORMS,
    GROUP_NORM,
    PRELU,
)
