"""The command ``harmonize``: thin over papermill and the library."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sized
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from tqdm import tqdm
from typer.exceptions import TyperException

from harmonize_lib import paths, plots
from harmonize_lib.bam_data import build_bam
from harmonize_lib.claims import merge_claims, update_readme
from harmonize_lib.data import load_dataset
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.models import find_device, list_models, load_model, manifest
from harmonize_lib.parameters import NOTEBOOKS, check, known
from harmonize_lib.plots import PACKAGES
from harmonize_lib.runner import (
    Job,
    Maps,
    Outcome,
    connect,
    in_one_line,
    is_unchanged,
    missing_maps,
    preflight,
    run_jobs,
    seconds_of_shard,
    study_job,
)
from harmonize_lib.storage import write_atomic
from harmonize_lib.sweep import as_json, draw, find_notebook, folder_of, read_sweep, results, slug
from harmonize_lib.train import parse_name
from harmonize_lib.train import train as train_model
from harmonize_lib.verify import verify as verify_figures

PROFILES = paths.NOTEBOOKS / "profiles"
RUN_PACKAGES = ("papermill", "nbconvert", "dask", "distributed")

HELP = """Attributions across architectures: run the study, sweep its parameters, train its models.

harmonize COMMAND --help explains each command."""

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=HELP
)


Notebooks = Annotated[
    list[str] | None, typer.Argument(help="numbers, names or paths: 01, 04_cross_architecture_transfer; none: all")
]


def _out(text: str) -> Path:
    if not text:
        raise typer.BadParameter("it is empty, give a folder")
    return Path(text)


def _folder_option(meaning: str) -> Any:
    return typer.Option("--out", parser=_out, metavar="FOLDER", help=meaning)


Jobs = Annotated[
    int | None,
    typer.Option(
        min=1, help="processes at once; none: one per core, at most 4, or 1 with a GPU. No result depends on it"
    ),
]
Scheduler = Annotated[
    str | None, typer.Option(help="address of a running Dask scheduler to compute on, e.g. tcp://127.0.0.1:8786")
]
Limit = Annotated[float, typer.Option("--timeout", min=1, help="seconds after which a notebook is given up")]
Fresh = Annotated[bool, typer.Option("--fresh", help="run again also what has not changed since it finished")]


def _notebooks(names: list[str] | None, profile: str = "quick") -> list[str]:
    chosen = list(dict.fromkeys(find_notebook(name) for name in names or NOTEBOOKS))
    if profile == "quick":
        return chosen
    there = [name for name in chosen if (PROFILES / profile / f"{name}.yaml").is_file()]
    left = [name for name in chosen if name not in there]
    if names and left:
        raise HarmonizeError(f"profile {profile} has no parameters for {left[0]}: see notebooks/profiles/{profile}")
    if left:
        print(f"left out, without parameters in profile {profile}: {', '.join(left)}", file=sys.stderr)
    return there


def _profile(profile: str, notebook: str) -> dict[str, Any]:
    if profile == "quick":
        return {}
    return yaml.safe_load((PROFILES / profile / f"{notebook}.yaml").read_text(encoding="utf-8")) or {}


def _given(pairs: list[str] | None) -> dict[str, Any]:
    values = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise HarmonizeError(f"-p {pair[:60]}: write -p NAME VALUE")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            line = str(error).splitlines()[0][:100]
            raise HarmonizeError(f"parameter {name[:40]!r}: its value is no YAML: {line}") from error
    as_json(values)
    return values


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(jobs: int | None) -> int:
    return jobs or (1 if torch.cuda.is_available() else min(4, _cores()))


def _check_place(figures: Path, notebook: str, values: dict[str, Any]) -> None:
    """Refuse to replace the committed figures by those of other parameters."""
    if figures != paths.ROOT / "figures":
        return
    given, committed = check(notebook, values).model_dump(), NOTEBOOKS[notebook]().model_dump()
    for name, value in given.items():
        if value != committed[name]:
            line = f"{notebook}: {name} = {json.dumps(value)[:40]} is not the default, which figures/ is made with"
            raise HarmonizeError(f"{line}: pass --out FOLDER")


def _folder(out: Path) -> Path:
    """Make a folder for output, which must be one and must be writable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out.resolve()
    except OSError as error:
        raise HarmonizeError(f"--out {str(out)[-80:]}: {error.strerror}: give a folder that can be written") from error


def _execute(jobs: list[Job], workers: int, scheduler: str | None, fresh: bool) -> list[Outcome]:
    """Run what has changed, telling failures as they come."""

    def tell(job: Job, outcome: Outcome) -> None:
        for note in outcome.notes:
            tqdm.write(f"{job.name}: {note}", file=sys.stderr)
        if outcome.state != "finished":
            tqdm.write(in_one_line(job, outcome), file=sys.stderr)

    if fresh:
        for job in jobs:
            job.status.unlink(missing_ok=True)
    same = {job.target for job in jobs if is_unchanged(job)}
    if any(job.target not in same and not job.last for job in jobs):
        same -= {job.target for job in jobs if job.last}  # what it reads may change
    changed = [job for job in jobs if job.target not in same]
    settings = [check(job.source.stem, job.parameters) for job in changed]
    clustered = changed and (scheduler is not None or workers > 1)
    outcomes = iter(run_jobs(changed, workers, scheduler, missing_maps(settings) if clustered else (), tell))
    return [Outcome("unchanged") if job.target in same else next(outcomes) for job in jobs]


def _exit(outcomes: list[Outcome]) -> None:
    """Exit code: 130 after Ctrl-C, 1 after a failure, 2 where all failures are mistakes in what was asked for."""
    states = {outcome.state for outcome in outcomes}
    if "interrupted" in states:
        raise typer.Exit(130)
    if "failed" in states:
        failed = [outcome.error for outcome in outcomes if outcome.state == "failed"]
        raise typer.Exit(2 if all(error.startswith("HarmonizeError") for error in failed) else 1)


@app.command()
def run(
    notebooks: Notebooks = None,
    profile: Annotated[
        str, typer.Option(help="quick: the committed defaults; paper: full sizes; imagenet: pretrained models")
    ] = "quick",
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="NAME VALUE", help="a parameter, for every notebook that has it; may be repeated"),
    ] = None,
    out: Annotated[
        Path | None,
        _folder_option("for figures and executed notebooks; none: figures/, for the default parameters only"),
    ] = None,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    timeout: Limit = 6 * 3600,
    fresh: Fresh = False,
) -> None:
    """Run notebooks and make their figures; what finished before and has not changed is not run again.

    Every notebook with its defaults: harmonize run

    One, your way: harmonize run 04 -p n_images 40 -p models '[vgg-obj, vit-obj]' --out mine
    """
    start = time.monotonic()
    profiles = ["quick", *sorted(path.name for path in PROFILES.iterdir() if path.is_dir())]
    if profile not in profiles:
        raise unknown("profile", profile, profiles)
    given = _given(parameter)
    if "output" in given:
        raise HarmonizeError("parameter 'output': choose the folder with --out")
    chosen = _notebooks(notebooks, profile)
    fields = {name: NOTEBOOKS[name].model_fields for name in chosen}
    for key in given:
        if not any(key in each for each in fields.values()):
            raise unknown(
                "parameter", key, {field for each in fields.values() for field in each}, "harmonize params NAME"
            )
    settings = {
        name: _profile(profile, name) | {key: value for key, value in given.items() if key in fields[name]}
        for name in chosen
    }
    if scheduler is not None:
        connect(scheduler).close()
    figures = (out or paths.FIGURES).resolve()
    work = [study_job(name, values, figures, timeout) for name, values in settings.items()]
    for one in work:
        _check_place(figures, one.name, settings[one.name])
        preflight(check(one.name, settings[one.name]))
    figures = _folder(figures)
    began = time.time()
    outcomes = _execute(work, _workers(jobs), scheduler, fresh)
    made = [path for path in figures.glob("*/*.json") if path.stat().st_mtime >= began]
    states = [outcome.state for outcome in outcomes]
    if set(states) != {"unchanged"}:
        print(f"{_count(made, 'figure')} written to {out or 'figures/'}")
    if "unchanged" in states:
        same = ", ".join(job.name[:2] for job, state in zip(work, states, strict=True) if state == "unchanged")
        print(f"not run again, unchanged since they finished: {same} (--fresh runs them)")
    if "failed" in states or "interrupted" in states:
        print("the ledger of claims was left as it is")
    else:
        claims = merge_claims(figures)
        if figures == paths.ROOT / "figures":
            update_readme(paths.ROOT / "README.md", claims)
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in claims["verdict"].value_counts().items())
        print(f"{_count(claims, 'claim')} so far: {verdicts}" if len(claims) else "no claims yet")
    done = len(work) - states.count("failed") - states.count("interrupted")
    print(f"{done} of {len(work)} notebooks finished in {time.monotonic() - start:.0f} s")
    _exit(outcomes)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML with notebook:, grid: and, if wanted, base:")],
    out: Annotated[Path | None, _folder_option("for all of it; none: runs/ in the repository")] = None,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    timeout: Limit = 6 * 3600,
    fresh: Fresh = False,
) -> None:
    """Run a notebook over a grid of parameters: one tidy table of all its results, and a figure.

    The file names the notebook, values that are the same throughout, and lists of values of which every combination is
    run:

    notebook: 04

    base: {n_images: 20, models: [resnet-obj, vit-obj]}

    grid: {fill: [mean, blur, road], patch: [2, 4, 8, 16]}
    """
    start = time.monotonic()
    plan = read_sweep(file)
    folder = (out or paths.ROOT / "runs" / f"sweep-{slug({'file': file.stem})}").resolve()
    if scheduler is not None:
        connect(scheduler).close()
    work = []
    for values in plan.sets:
        job = study_job(plan.notebook, values, folder_of(folder, plan.varied(values)), timeout)
        work.append(replace(job, name=", ".join(f"{key}={value}" for key, value in plan.varied(values).items())))
        preflight(check(plan.notebook, values))
    folder = _folder(folder)
    outcomes = _execute(work, _workers(jobs), scheduler, fresh)
    states = [outcome.state for outcome in outcomes]
    done = [
        (plan.varied(values), job.figures.parent)
        for values, job, state in zip(plan.sets, work, states, strict=True)
        if state in ("finished", "unchanged")
    ]
    table = results(plan.notebook, done)
    if len(table):
        plots.style()
        figure = draw(table, plan.grid, f"{plan.notebook} over {' × '.join(plan.grid)}")
        values = {"notebook": plan.notebook, "sets": [dict(varied) for varied, _ in done], "file": file.name}
        plots.save_figure(figure, table, folder, "sweep", values, {}, time.monotonic() - start)
        print(f"{len(table)} estimates of {len(done)} parameter sets: {folder / 'sweep.csv'}, sweep.svg and sweep.png")
    again = f", {states.count('unchanged')} of them before" if "unchanged" in states else ""
    print(f"{len(done)} of {len(work)} parameter sets finished{again}, in {time.monotonic() - start:.0f} s")
    _exit(outcomes)


@app.command()
def params(notebook: Annotated[str, typer.Argument(help="number, name or path of a notebook, e.g. 04")]) -> None:
    """List the parameters of a notebook: name, type, default, range and meaning."""
    name = find_notebook(notebook)
    schema, names = NOTEBOOKS[name].model_json_schema(), known(name)
    print(f"{name}: harmonize run {name[:2]} -p NAME VALUE, or papermill -p NAME VALUE")
    for key, told in schema["properties"].items():
        default, allowed = json.dumps(told["default"]), _range(told, schema.get("$defs", {}))
        print(f"\n{key}: {_kind(told)} = {default}{f'   ({allowed})' if allowed else ''}\n    {told['description']}")
        if key in names:
            print(f"    known: {', '.join(names[key])}")


KINDS = {"string": "text", "integer": "whole number", "number": "number", "object": "mapping"}


def _kind(told: dict[str, Any]) -> str:
    if told.get("type") == "array":
        return f"list of {_kind(told['items'])}"
    return KINDS.get(told.get("type", ""), "one of a list")


def _range(told: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A range as JSON schema tells it, in words."""
    signs = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}
    words = [f"{sign}{told[key]:g}" for key, sign in signs.items() if key in told]
    words += [f"one of {', '.join(map(str, told['enum']))}"] if "enum" in told else []
    words += [f"at least {told['minItems']} of them"] if "minItems" in told else []
    inner = _range(told["items"], definitions) if "items" in told else ""
    return ", ".join([*words, *([f"each {inner}"] if inner else [])])


@app.command()
def export(
    notebooks: Notebooks = None,
    out: Annotated[Path, _folder_option("for the HTML")] = Path("html"),
) -> None:
    """Write notebooks with their outputs as HTML pages: the last run's where it finished, else as committed.

    A path to any other notebook, e.g. of a run with --out, exports that one.
    """
    from nbconvert import HTMLExporter

    sources = []
    for name in notebooks or NOTEBOOKS:
        path = Path(name)
        if path.suffix == ".ipynb" and path.is_file():
            sources.append(path)
            continue
        path = paths.NOTEBOOKS / f"{find_notebook(name)}.ipynb"
        ran = paths.ROOT / "runs" / path.name
        sources.append(ran if ran.with_suffix(".status.json").is_file() and ran.is_file() else path)
    folder = _folder(out)
    for source in tqdm(sources, desc="pages"):
        try:
            page, _ = HTMLExporter().from_filename(str(source))
        except Exception as error:
            raise HarmonizeError(f"{source.name} is not a readable notebook: {str(error)[:80]!r}") from error
        write_atomic(folder / f"{source.stem}.html", page)
    print(f"{_count(sources, 'page')} written to {out}")


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"


@app.command()
def train(
    models: Annotated[
        list[str] | None, typer.Argument(help="zoo names, e.g. resnet-obj vit-scene-s1; none: the zoo")
    ] = None,
    out: Annotated[
        Path | None, _folder_option("for weights and manifest; must be given: data/weights replaces those that ship")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Train models of the zoo from scratch; a killed run goes on where it stopped."""
    names = models or list_models()
    for name in names:
        parse_name(name)
    find_device(device)
    if out is None:
        raise HarmonizeError("train: pass --out FOLDER for the weights; data/weights replaces those that ship")
    for name in names:
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
    print(f"classes: {'; '.join(dataset.classes)}")
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
    """Say what is installed, whether the weights are whole, and what room and time a run takes."""
    print("  ".join(f"{package} {version(package)}" for package in (*PACKAGES, *RUN_PACKAGES)))
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"device: {place}; {_cores()} cores; harmonize run starts {_workers(None)} jobs")
    entries = manifest()
    bad = []
    for name in tqdm(entries, desc="weights"):
        try:
            load_model(name, device="cpu")
        except HarmonizeError as error:
            bad.append(str(error))
    print(f"weights: {len(entries) - len(bad)} of {len(entries)} whole: {', '.join(entries)}")
    for line in bad:
        print(line, file=sys.stderr)
    stored = sum(path.stat().st_size for path in paths.CACHE.rglob("*") if path.is_file())
    there = next(folder for folder in (paths.CACHE, *paths.CACHE.parents) if folder.exists())
    print(f"disk: {stored / 1e9:.2f} GB of attributions stored, {shutil.disk_usage(there).free / 1e9:.0f} GB free")
    if not bad:
        print(_time_estimate())
    if bad:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[Path | None, typer.Argument(help="what a run with --out wrote; none: the repository")] = None,
) -> None:
    """Check that every figure, table and notebook output is what its provenance says."""
    if folder is not None and not any(folder.glob("[0-9][0-9]_*.ipynb")):
        raise HarmonizeError(f"{str(folder)[-80:]} holds no executed notebook: give the --out of a harmonize run")
    problems, summary = verify_figures(folder, folder)
    for line in problems:
        print(line, file=sys.stderr)
    print(summary)
    if problems:
        raise typer.Exit(1)


def _time_estimate() -> str:
    """What harmonize run will take: on this machine where it is known from attributions, else as recorded."""
    work = [study_job(name, {}, paths.FIGURES.resolve(), 1) for name in NOTEBOOKS]
    todo = [job.name for job in work if not is_unchanged(job)]
    if not todo:
        return "time: all notebooks are finished and unchanged; harmonize run has nothing to do"
    units = missing_maps(check(name, {}) for name in todo)
    torch.set_num_threads(1)
    alike: dict[tuple[str, ...], list[Maps]] = {}
    for unit in units:
        alike.setdefault((unit.notebook, unit.model, unit.method), []).append(unit)
    seconds = sum(seconds_of_shard(some[0]) * len(some) for some in tqdm(alike.values(), desc="time estimate"))
    recorded = sum(_recorded_seconds(name) for name in todo)
    jobs = _workers(None)
    return (
        f"time: at least {(seconds + recorded) / jobs / 60:.0f} minutes in {jobs} jobs for {len(todo)} of {len(work)} "
        f"notebooks: {seconds:.0f} s of one core here for {len(units)} shards of attributions that are missing, and "
        f"{recorded:.0f} s that the notebooks took when last committed, with what they had stored"
    )


def _recorded_seconds(notebook: str) -> float:
    told = [json.loads(path.read_text()).get("seconds", 0) for path in (paths.FIGURES / notebook).glob("*.json")]
    return max(told, default=0.0)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 2."""
    sys.path.append(os.getcwd())  # where a user's python:module:callable lies
    try:
        code = app(args=_joined(sys.argv[1:]), prog_name="harmonize", standalone_mode=False)
    except TyperException as error:
        if len(sys.argv) < 2:
            print(error.format_message())
            sys.exit(0)
        code = _mistake(f"{error.format_message().rstrip('.')}: see harmonize --help")
    except HarmonizeError as error:
        code = _mistake(str(error))
    except OSError as error:
        code = _mistake(f"{error.filename or 'writing'}: {error.strerror or error}")
    except typer.Abort:
        code = 130
    sys.exit(code or 0)


def _mistake(line: str) -> int:
    line = f"harmonize: {' '.join(line.split())}"
    print(line if len(line) <= 200 else f"{line[:197]}...", file=sys.stderr)
    return 2


def _joined(arguments: list[str]) -> list[str]:
    """Let ``-p NAME VALUE`` be ``-p NAME=VALUE``, so that it is one option that may be repeated."""
    joined: list[str] = []
    for argument in arguments:
        named = len(joined) > 1 and joined[-2] == "-p" and "=" not in joined[-1]
        if named and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined
