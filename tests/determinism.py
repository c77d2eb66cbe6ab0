"""Run notebooks twice from nothing and compare every table and picture byte for byte.

    python tests/determinism.py 03 04 -y '{n_images: 10}'

Each run has its own cache and figures folder. Figures that declare themselves timed (measured seconds) are listed and
left out. Exit code 1 when a byte differs.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from harmonize_lib import paths
from harmonize_lib.parameters import NOTEBOOKS, check


def run_cold(name: str, values: dict[str, object], folder: Path) -> None:
    """Run one notebook through papermill with a cache and figures of its own."""
    folder.mkdir(parents=True)
    own = {"HARMONIZE_CACHE": str(folder / "cache"), "HARMONIZE_FIGURES": str(folder / "figures")}
    source, result = paths.NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(result), "--log-level", "ERROR"]
    command += ["--kernel", "python3", "--no-progress-bar", "-y", yaml.safe_dump(values)]
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT), "TQDM_DISABLE": "1", **own}
    subprocess.run(command, check=True, env=environment)


def compare(first: Path, second: Path) -> tuple[list[str], list[str], int]:
    """Which tables and pictures of two figures folders differ, which figures are timed, how many files are the same."""
    timed = set()
    for folder in (first, second):
        for path in folder.glob("*/*.json"):
            if json.loads(path.read_text())["timed"]:
                timed.add(path.relative_to(folder).with_suffix(""))
    files = {
        path.relative_to(folder)
        for folder in (first, second)
        for path in folder.rglob("*")
        if path.suffix in (".csv", ".svg", ".png", ".sha256")
    }
    compared = sorted(path for path in files if path.with_suffix("") not in timed)
    same, other, absent = filecmp.cmpfiles(first, second, map(str, compared), shallow=False)
    return sorted([*other, *absent]), sorted(map(str, timed)), len(same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="03, 04_cross_architecture_transfer, ...; none: all")
    parser.add_argument("-y", "--parameters", type=yaml.safe_load, default={}, help="YAML, for those that have them")
    parser.add_argument("--keep", type=Path, help="folder for both runs; none: a temporary one")
    given = parser.parse_args()
    names = [name for name in NOTEBOOKS if not given.notebooks or name[:2] in {item[:2] for item in given.notebooks}]
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            values = {key: value for key, value in given.parameters.items() if key in NOTEBOOKS[name].model_fields}
            check(name, values)
            folders = [(given.keep or Path(temporary)) / name / turn for turn in ("first", "second")]
            for folder in folders:
                run_cold(name, values, folder)
            differ, timed, same = compare(*(folder / "figures" for folder in folders))
            print(f"{name}: {same} files the same, {len(differ)} differ; timed: {', '.join(timed) or 'none'}")
            for path in differ:
                print(f"  differs: {path}")
            bad += len(differ) + (same == 0)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
