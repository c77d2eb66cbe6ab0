"""Train models of the zoo from scratch with ``harmonize train`` and compare them with the manifest.

python tests/retraining.py OUT [--models resnet-obj swin-obj]

A model that OUT/weights already holds is not trained again. Fails where an accuracy is more than a point away. Writes
OUT/retraining.csv, .svg, .png and .json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from harmonize_lib import paths, plots

POINT = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["resnet-obj", "swin-obj"])
    given = parser.parse_args()
    began, weights = time.monotonic(), given.out / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    there = json.loads((weights / "manifest.json").read_text()) if (weights / "manifest.json").is_file() else {}
    command = [sys.executable, "-c", "from harmonize_lib.cli import main; main()", "train"]
    if missing := [name for name in given.models if name not in there]:
        subprocess.run([*command, *missing, "--out", str(weights)], check=True)
    rows = []
    for run, folder in (("shipped", paths.WEIGHTS), ("trained again", weights)):
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in given.models:
            row = manifest[name]
            numbers = [row[key] for key in ("accuracy", "accuracy_low", "accuracy_high", "test_images")]
            rows.append((name, run, *numbers, row["training_seconds"], row["device"], row["sha256"]))
    columns = ["model", "run", "mean", "low", "high", "n", "training_seconds", "device", "sha256"]
    table = pd.DataFrame(rows, columns=columns)
    change = table.pivot(index="model", columns="run", values="mean")
    most = float((change["trained again"] - change["shipped"]).abs().max())
    plots.style()
    figure, ax = plt.subplots(figsize=(5.6, 1.2 + 0.4 * len(given.models)))
    plots.forest(ax, table, "model", f"Trained again: accuracy differs by at most {most:.4f}", "test accuracy", "run")
    ax.set_xlim(0.97, 1)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    seconds = time.monotonic() - began
    plots.save_figure(figure, table, given.out, "retraining", {"models": given.models}, {}, seconds, timed=True)
    print(table.drop(columns="sha256").to_string(index=False))
    sys.exit(most > POINT)


if __name__ == "__main__":
    main()
