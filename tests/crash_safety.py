"""Kill extraction and ``harmonize run`` at random moments, resume, and compare every table with an undisturbed run.

python tests/crash_safety.py OUT [--kills 20] [--n-images 20] [--notebooks 03 04]

Half of the kills strike the process of ``harmonize run`` (its workers must follow it), half a worker or a notebook's
own process. They come at moments drawn over the time the undisturbed run takes, and only when results are stored and
notebooks still to be finished. A run is started again until it finishes; its tables are then compared, these bytes are
those of all kills since its store was empty, and the next run begins with an empty store. Writes
OUT/crash_safety.csv, .svg, .png and .json.
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

MODELS = "[resnet-obj, vgg-obj, vit-obj]"
METHODS = "[saliency, integrated_gradients, grad_cam, occlusion]"


def start(out: Path, cache: Path, notebooks: list[str], n_images: int, jobs: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from harmonize_lib.cli import main; main()", "run", *notebooks, "--out", str(out)]
    command += ["-p", "n_images", str(n_images), "-p", "models", MODELS, "-p", "methods", METHODS, "--jobs", str(jobs)]
    environment = dict(os.environ) | {"HARMONIZE_CACHE": str(cache)}
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def tables(out: Path) -> set[Path]:
    """Every table and claim."""
    return {path.relative_to(out) for path in out.rglob("*.csv")}


def stored(cache: Path) -> int:
    """How many results are in the store."""
    return len(list(cache.rglob("*.safetensors")))


def finished(out: Path) -> int:
    """How many notebooks are finished."""
    return len(list(out.glob("*.status.json")))


def differing_bytes(calm: Path, killed: Path) -> int:
    """Bytes in which the tables of two runs differ; a table that only one has differs in all."""
    count = 0
    for name in tables(calm) | tables(killed):
        one, other = ((out / name).read_bytes() if (out / name).exists() else b"" for out in (calm, killed))
        count += sum(x != y for x, y in zip(one, other, strict=False)) + abs(len(one) - len(other))
    return count


def left_over(out: Path, cache: Path) -> list[str]:
    """Files that would have been renamed when whole; nothing reads hidden ones, which a kill in a write leaves."""
    files = [path for folder in (out, cache) for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if ".partial." in path.name or (path.name[0] == "." and path.suffix != ".lock")]


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
    calm, killed = given.out / "undisturbed", given.out / "killed"
    calm_cache, cache = given.out / "cache_undisturbed", given.out / "cache_killed"
    for folder in (calm, killed, calm_cache, cache):
        shutil.rmtree(folder, ignore_errors=True)
    setting = (given.notebooks, given.n_images, given.jobs)

    clock, first = time.monotonic(), None
    process = start(calm, calm_cache, *setting)
    while process.poll() is None:
        time.sleep(0.1)
        if first is None and stored(calm_cache):
            first = time.monotonic() - clock
    whole = time.monotonic() - clock
    if process.returncode or first is None:
        raise SystemExit(f"the undisturbed run failed: see {calm.with_suffix('.log')}")
    print(f"undisturbed: {whole:.0f} s, the first result stored after {first:.0f} s", flush=True)

    rows: list[dict[str, object]] = []
    compared = resumes = total = 0  # kills whose run has finished and was compared; starts after a kill; bytes
    partial: list[str] = []
    while compared < given.kills:
        resumes += len(rows) > compared
        process = start(killed, cache, *setting)
        top, kind = psutil.Process(process.pid), ""
        moment = rng.uniform(0 if stored(cache) else first, whole)
        try:
            process.wait(moment if len(rows) < given.kills else None)
        except subprocess.TimeoutExpired:
            there = {"results_stored": stored(cache), "notebooks_finished": finished(killed)}
            if there["results_stored"] and there["notebooks_finished"] < len(given.notebooks):
                below = top.children(recursive=True)
                kind = kill_one(top, rng)
                rows.append({"kill": len(rows) + 1, "victim": kind, "after_seconds": round(moment, 1), **there})
        code = process.wait()  # a run that lost a worker, a kernel or a notebook's process goes on
        if kind == "harmonize run":
            settle(top, below)
        if kind:
            rows[-1]["same_run_finished"] = code == 0
            print(f"kill {len(rows)}: {kind} after {moment:.1f} s; {there}; exit code {code}", flush=True)
        elif code:
            raise SystemExit(f"exit code {code} without a kill: see {killed.with_suffix('.log')}")
        if code == 0:
            differing = differing_bytes(calm, killed)
            total += differing
            for row in rows[compared:]:
                row |= {"tables_compared": len(tables(calm) | tables(killed)), "differing_bytes": differing}
            print(
                f"finished: {len(rows) - compared} kills since the store was empty, {differing} bytes differ",
                flush=True,
            )
            partial += left_over(killed, cache)
            compared = len(rows)
            shutil.rmtree(killed)
            shutil.rmtree(cache)
    table = pd.DataFrame(rows)
    plots.style()
    figure, ax = plt.subplots(figsize=(5.6, 2.8))
    for kind, part in table.groupby("victim"):
        ax.plot(part["kill"], part["results_stored"], "o", ms=4, label=kind)
    ax.axhline(stored(calm_cache), color="0.4", ls="--", lw=1, label="undisturbed run")
    ax.set(
        xlabel="kill", ylabel="results in the store at the kill", xticks=range(1, given.kills + 1, 2), ylim=(0, None)
    )
    count = int(table["tables_compared"].max())
    ax.set_title(f"{len(table)} kills, {resumes} resumes: {total} bytes of {count} tables differ")
    ax.legend(title="what was killed", fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    values = {name: value for name, value in vars(given).items() if name != "out"}
    plots.save_figure(figure, table, given.out, "crash_safety", values, {}, time.monotonic() - began)
    print(f"{len(table)} kills, {resumes} resumes, {total} differing bytes of {count} tables; left over: {partial}")
    sys.exit(bool(total or any(".partial." in name for name in partial)))


if __name__ == "__main__":
    main()
