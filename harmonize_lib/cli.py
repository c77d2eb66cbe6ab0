"""The command ``harmonize``: thin over papermill and the library."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from tqdm import tqdm

from harmonize_lib import paths
from harmonize_lib.bam_data import build_bam
from harmonize_lib.claims import merge_claims, update_readme
from harmonize_lib.data import load_dataset
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.models import list_models, load_model, manifest
from harmonize_lib.parameters import NOTEBOOKS, check
from harmonize_lib.plots import PACKAGES
from harmonize_lib.train import train as train_model

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def _notebooks(names: list[str]) -> list[str]:
    chosen = []
    for name in names or list(NOTEBOOKS):
        stem = Path(name).stem
        match = [notebook for notebook in NOTEBOOKS if notebook == stem or notebook.split("_")[0] == stem]
        if not match:
            raise unknown("notebook", name, NOTEBOOKS)
        chosen += match
    return chosen


def _values(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    try:
        return {name: yaml.safe_load(value) for name, value in pairs}
    except yaml.YAMLError as error:
        raise HarmonizeError(f"parameter value is no YAML: {str(error).splitlines()[0][:100]}") from error


@app.command()
def run(
    notebooks: Annotated[
        list[str] | None, typer.Argument(help="01, 04_cross_architecture_transfer, …; none: all")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="NAME=VALUE, a parameter for every notebook that has it")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the figures; none: figures/")] = None,
) -> None:
    """Run notebooks with their default or given parameters and make their figures."""
    start = time.monotonic()
    chosen = _notebooks(notebooks or [])
    pairs = [tuple(item.split("=", 1)) for item in parameter or []]
    for pair in pairs:
        if len(pair) != 2:
            raise HarmonizeError(f"-p {pair[0]!r}: write -p NAME=VALUE")
    given = _values(pairs)  # type: ignore[arg-type]
    figures = (out or paths.FIGURES).resolve()
    if out is not None:
        given["output"] = str(figures)
    settings = {
        name: {key: value for key, value in given.items() if key in NOTEBOOKS[name].model_fields} for name in chosen
    }
    for key in given:
        if not any(key in values for values in settings.values()):
            raise unknown("parameter", key, {field for name in chosen for field in NOTEBOOKS[name].model_fields})
    for name, values in settings.items():
        check(name, values)
    began = time.time()
    failed = {}
    bar = tqdm(chosen, desc="notebooks", unit="notebook")
    for name in bar:
        bar.set_postfix_str(name)
        line = _execute(name, settings[name])
        if line:
            failed[name] = line
            tqdm.write(f"failed: {name}: {line}", file=sys.stderr)
    fresh = [path for path in figures.glob("*/*.json") if path.stat().st_mtime >= began]
    claims = merge_claims(figures)
    if figures == paths.ROOT / "figures":
        update_readme(paths.ROOT / "README.md", claims)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in claims["verdict"].value_counts().items())
    print(f"{len(fresh)} figures written to {out or 'figures/'}")
    print(f"{len(claims)} claims so far: {verdicts}" if len(claims) else "no claims yet")
    print(f"{len(chosen) - len(failed)} of {len(chosen)} notebooks finished in {time.monotonic() - start:.0f} s")
    if failed:
        raise typer.Exit(1)


def _execute(name: str, values: dict[str, Any]) -> str:
    """Run one notebook in a child process; the error in one line, or nothing."""
    folder = paths.ROOT / "runs"
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "papermill", str(paths.NOTEBOOKS / f"{name}.ipynb"), str(folder / f"{name}.ipynb")]
    command += ["--kernel", "python3", "--progress-bar", "-y", yaml.safe_dump(values)]
    told = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:  # noqa: S603
        for line in child.stderr or ():  # the progress bar's carriage returns count as line ends
            if line.startswith("Executing:"):
                sys.stderr.write("\r" + f"{name} {line.strip()[10:]}"[:110].ljust(110))
                sys.stderr.flush()
            elif line.strip():
                told.append(line.strip())
    sys.stderr.write("\r" + " " * 110 + "\r")
    if child.returncode == 0:
        return ""
    return ([line for line in told if "Error" in line] or told or ["no message"])[-1][:300]


@app.command()
def train(
    models: Annotated[
        list[str] | None, typer.Argument(help="zoo names, e.g. resnet-obj vit-scene-s1; none: the zoo")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for weights and manifest")] = paths.WEIGHTS,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Train models of the zoo from scratch; a killed run goes on where it stopped."""
    for name in models or list_models():
        entry = train_model(name, out, device)
        low, high = entry["accuracy_low"], entry["accuracy_high"]
        print(f"{name}: accuracy {entry['accuracy']:.4f} [{low:.4f}, {high:.4f}], n = {entry['test_images']}")


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="shapes-on-scenes, bam:DIR, imagefolder:DIR, …")] = "shapes-on-scenes",
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    n: Annotated[int, typer.Option(help="how many images")] = 100,
) -> None:
    """Load a data set, check it, and say what it holds."""
    dataset = load_dataset(name, split, n)
    counts = torch.bincount(dataset.labels, minlength=len(dataset.classes))
    print(f"{dataset.name}: {len(dataset)} images {tuple(dataset.images.shape[1:])}, {len(dataset.classes)} classes")
    print(f"images per class: {int(counts.min())} to {int(counts.max())}")
    print("masks: " + ("none" if dataset.masks is None else f"cover {dataset.masks.float().mean():.1%} of the image"))


@app.command("build-bam")
def build_bam_set(
    annotations: Annotated[Path, typer.Argument(help="COCO's instances_*.json")],
    photographs: Annotated[Path, typer.Argument(help="folder of its images")],
    places: Annotated[Path, typer.Argument(help="folder with one folder of images per scene")],
    out: Annotated[Path, typer.Argument(help="new folder for the set")],
    per_class: Annotated[int, typer.Option(help="images per pair of object and scene")] = 1000,
    seed: Annotated[int, typer.Option(help="seed of sizes and locations")] = 0,
    as_published: Annotated[bool, typer.Option(help="with the quirks of the published builder")] = False,
) -> None:
    """Build BAM in its published layout from COCO instances and MiniPlaces."""
    for name, count in build_bam(annotations, photographs, places, out, per_class, seed, as_published).items():
        print(f"{name}: {count} images")


@app.command()
def doctor() -> None:
    """Say what is installed, which device there is, and whether the shipped weights are whole."""
    from importlib.metadata import version

    print("  ".join(f"{package} {version(package)}" for package in PACKAGES))
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {place}")
    entries = manifest()
    bad = []
    for name in tqdm(entries, desc="weights"):
        try:
            load_model(name, device="cpu")
        except HarmonizeError as error:
            bad.append(str(error))
    print(f"weights: {len(entries) - len(bad)} of {len(entries)} whole")
    for line in bad:
        print(line, file=sys.stderr)
    if bad:
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except HarmonizeError as error:
        print(f"harmonize: {error}", file=sys.stderr)
        sys.exit(2)
