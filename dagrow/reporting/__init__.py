"""The command line and the demo: they show what the other rooms do, and nothing imports them.

``dagrow inspect`` traces a model and prints what can grow in it; ``dagrow demo`` makes a trained network larger that
has stopped improving, and compares that with other ways to go on. Both stand on :mod:`dagrow.growing`,
:mod:`dagrow.graph` and :mod:`dagrow.pictures` as any user's program would.

>>> from dagrow.reporting import main
>>> main(["inspect", "torch.nn:Flatten", "--input", "2,3"])  # doctest: +ELLIPSIS
Dag(Flatten, 0 edges, 0 axes, 0 growable)...
0
"""

from dagrow.reporting._cli import main
from dagrow.reporting._data import mnist

__all__ = ["main", "mnist"]
