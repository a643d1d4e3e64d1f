"""`python -m cloq` is the command line."""

import sys

from cloq.cli import main

sys.exit(main())
