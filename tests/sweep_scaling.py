"""Time a sweep on one and on two single-threaded workers, and compare the tables and pictures.

python tests/sweep_scaling.py OUT [--n-images 20]

Exit code 1 when a byte differs, or two workers take more than 0.65 of the time of one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

MOST = 0.65
PLAN = {
    "notebook": "03",
    "base": {
        "models": ["resnet-obj", "vgg-obj", "vit-obj"],
        "methods": ["saliency", "integrated_gradients", "grad_cam"],
    },
    "grid": {"seed": [0, 1, 2], "patch": [2, 4, 8, 16]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--n-images", type=int, default=20)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    plan = PLAN | {"base": PLAN["base"] | {"n_images": given.n_images}}
    (given.out / "grid.yaml").write_text(yaml.safe_dump(plan))
    seconds = {}
    for jobs in (1, 2):
        folder, cache = given.out / f"jobs{jobs}", given.out / f"cache{jobs}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
        command = [sys.executable, "-c", "from harmonize_lib.cli import main; main()", "sweep", "--out", str(folder)]
        command += ["--jobs", str(jobs), str(given.out / "grid.yaml")]
        begin = time.monotonic()
        subprocess.run(command, env=dict(os.environ) | {"HARMONIZE_CACHE": str(cache)}, check=True)
        seconds[jobs] = time.monotonic() - begin
    names = []
    for jobs in (1, 2):
        folder = given.out / f"jobs{jobs}"
        names.append(sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".csv", ".svg")))
    same = names[0] == names[1] and all(
        (given.out / "jobs1" / name).read_bytes() == (given.out / "jobs2" / name).read_bytes() for name in names[0]
    )
    ratio = seconds[2] / seconds[1]
    print(f"12 parameter sets: {seconds[1]:.0f} s on one worker, {seconds[2]:.0f} s on two: ratio {ratio:.2f}")
    print(f"{len(names[0])} tables and pictures {'identical' if same else 'DIFFER'}")
    sys.exit(not same or ratio > MOST)


if __name__ == "__main__":
    main()
