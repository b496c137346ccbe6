"""``python -m dagrow``."""

import sys

from dagrow.cli import main

if __name__ == "__main__":
    sys.exit(main())
