"""``python -m dagrow``."""

import sys

from dagrow.reporting import main

if __name__ == "__main__":
    sys.exit(main())
