"""Scripts find their parts beside themselves, as `python scripts/NAME.py` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
