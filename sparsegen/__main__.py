"""Run the command line as `python -m sparsegen`."""

import sys

from sparsegen.cli import main

if __name__ == "__main__":
    sys.exit(main())
