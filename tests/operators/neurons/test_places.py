"""Units of several channels."""

from torch import nn

UNITS = {
    "group norm": [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 3, 1)],
    "groups": [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1)],
    "reduction": [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 2, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(2, 3, 1, padding=1),
    ],
    "multiplier": [
        nn.Conv2d(3, 2, 3, padding=1),
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    ],
}
