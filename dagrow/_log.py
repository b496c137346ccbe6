"""The logger ``dagrow``, of Python's own logging: silent until a program asks for its messages.

What was applied, undone or left out is told at INFO; what a user should look at, at WARNING.
"""

import logging

LOG = logging.getLogger("dagrow")
LOG.addHandler(logging.NullHandler())
