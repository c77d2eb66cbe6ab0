"""Kill extraction and ``harmonize run`` at random moments, resume, and compare every table with an undisturbed run.

python tests/crash_safety.py OUT [--kills 20] [--n-images 20] [--notebooks 03 04]

Half of the kills strike the process of ``harmonize run`` (its workers must follow it), half a worker or a notebook's
own process. Writes OUT/crash_safety.csv, .svg, .png and .json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil

from harmonize_lib import plots
from harmonize_lib.storage import sha256_file

MODELS = "[resnet-obj, vgg-obj, vit-obj]"
METHODS = "[saliency, integrated_gradients, grad_cam, occlusion]"


def start(out: Path, cache: Path, notebooks: list[str], n_images: int, jobs: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from harmonize_lib.cli import main; main()", "run", *notebooks, "--out", str(out)]
    command += ["-p", "n_images", str(n_images), "-p", "models", MODELS, "-p", "methods", METHODS, "--jobs", str(jobs)]
    environment = dict(os.environ) | {"HARMONIZE_CACHE": str(cache)}
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def tables(out: Path) -> dict[str, str]:
    """Every table and claim by its hash."""
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in sorted(out.rglob("*.csv"))}


def stored(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*.safetensors")}


def differing_bytes(a: Path, b: Path) -> int:
    one, other = a.read_bytes(), b.read_bytes() if b.exists() else b""
    return sum(x != y for x, y in zip(one, other, strict=False)) + abs(len(one) - len(other))


def kill_one(main: psutil.Process, rng: np.random.Generator) -> str:
    """SIGKILL the main process or one below it; what it was."""
    below = [child for child in main.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    victim = main if rng.random() < 0.5 or not below else below[rng.integers(len(below))]
    line = " ".join(victim.cmdline())
    kinds = {"execution.py": "notebook's process", "ipykernel": "kernel", "multiprocessing": "worker"}
    kind = "harmonize run" if victim == main else next((kind for key, kind in kinds.items() if key in line), "other")
    victim.send_signal(signal.SIGKILL)
    return kind


def settle(main: psutil.Process, below: list[psutil.Process]) -> None:
    """Wait until everything that belonged to a killed run is gone by itself."""
    _, alive = psutil.wait_procs([main, *below], timeout=60)
    if alive:
        raise SystemExit(f"still alive a minute after the run was killed: {[process.cmdline() for process in alive]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--n-images", type=int, default=20)
    parser.add_argument("--notebooks", nargs="+", default=["03", "04"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began, rng = time.monotonic(), np.random.default_rng(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in ("undisturbed", "killed", "cache_undisturbed", "cache_killed"):
        shutil.rmtree(given.out / name, ignore_errors=True)
    calm, killed = given.out / "undisturbed", given.out / "killed"
    setting = (given.notebooks, given.n_images, given.jobs)

    clock = time.monotonic()
    if start(calm, given.out / "cache_undisturbed", *setting).wait():
        raise SystemExit(f"the undisturbed run failed: see {calm.with_suffix('.log')}")
    whole = time.monotonic() - clock
    rows = []
    while len(rows) < given.kills:
        process = start(killed, given.out / "cache_killed", *setting)
        top = psutil.Process(process.pid)
        wait = rng.uniform(0.05, 0.95) * whole
        try:
            process.wait(wait)
            shutil.rmtree(killed, ignore_errors=True)  # it was quicker than the blow: begin again from nothing
            shutil.rmtree(given.out / "cache_killed", ignore_errors=True)
            continue
        except subprocess.TimeoutExpired:
            below = top.children(recursive=True)
            kind = kill_one(top, rng)
        if kind == "harmonize run":
            process.wait()
            settle(top, below)
        else:
            process.wait()  # goes on without its victim
        finished = len(list(killed.glob("*.status.json")))
        shards = len(stored(given.out / "cache_killed"))
        rows.append((len(rows) + 1, kind, round(wait, 1), shards, finished))
        print(f"kill {len(rows)}: {kind} after {wait:.1f} s; {shards} results stored, {finished} notebooks", flush=True)
    code = start(killed, given.out / "cache_killed", *setting).wait()
    table = pd.DataFrame(rows, columns=["kill", "victim", "after_seconds", "results_stored", "notebooks_finished"])
    names = sorted(tables(calm).keys() | tables(killed).keys())
    differing = sum(differing_bytes(calm / name, killed / name) if (calm / name).exists() else 1 for name in names)
    partial = [p.name for p in given.out.rglob("*") if p.is_file() and (".partial." in p.name or p.suffix == ".tmp")]
    table["tables_compared"], table["differing_bytes"] = len(names), differing
    plots.style()
    figure, ax = plt.subplots(figsize=(5.6, 2.8))
    for kind, part in table.groupby("victim"):
        ax.plot(part["kill"], part["results_stored"], "o", ms=4, label=kind)
    ax.axhline(len(stored(given.out / "cache_undisturbed")), color="0.4", ls="--", lw=1, label="undisturbed run")
    ax.set(xlabel="kill and resume", ylabel="results in the store", xticks=range(1, given.kills + 1, 2))
    ax.set_title(f"{given.kills} kills, {given.kills} resumes: {differing} of the bytes of {len(names)} tables differ")
    ax.legend(title="what was killed", fontsize=6.5)
    values = {name: value for name, value in vars(given).items() if name != "out"}
    plots.save_figure(figure, table, given.out, "crash_safety", values, {}, time.monotonic() - began)
    print(f"last run: exit code {code}; {len(names)} tables, {differing} differing bytes; left over: {partial}")
    sys.exit(bool(code or differing or partial or tables(calm).keys() != tables(killed).keys()))


if __name__ == "__main__":
    main()
