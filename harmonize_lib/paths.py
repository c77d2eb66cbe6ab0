"""Where things are, from the repository's root; nothing depends on the working directory."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
WEIGHTS = DATA / "weights"
FIGURES = Path(os.environ.get("HARMONIZE_FIGURES", ROOT / "figures"))
CACHE = Path(os.environ.get("HARMONIZE_CACHE", DATA / "cache"))
