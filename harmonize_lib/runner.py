"""Runs that are either complete and provably so, or say what is missing: one child process per notebook, or Dask."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from harmonize_lib import bam_study, consensus_training, cross_architecture, execution, paths, penalty_study, study
from harmonize_lib.attribution import explain, refusal
from harmonize_lib.data import Dataset, load_dataset
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.models import Model, load_model
from harmonize_lib.parameters import NOTEBOOKS, Study, check
from harmonize_lib.plots import PACKAGES
from harmonize_lib.prior_study import load_pixels
from harmonize_lib.storage import sha256_file, sha256_json, write_atomic
from harmonize_lib.tabular import load_table

NOT_READ_BY_NOTEBOOKS = ("cli.py", "runner.py", "execution.py", "sweep.py", "verify.py")
STOP_SECONDS = 15  # how long a notebook that is stopped may take to save itself
CONNECT_SECONDS = 5
ADDRESS = re.compile(r"((tcp|tls|ws|wss|ucx)://)?(?P<host>[^/]+):(?P<port>\d{1,5})")
WORKER_SECONDS = 60
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
READS = {  # tables under the figures folder that other runs than the notebook's own make
    "04_cross_architecture_transfer": "imagenet-sample/*/*.csv",
    "09_attribution_priors": "*/09_attribution_priors/*.csv",
    "11_explanation_penalties": "real-data/11_explanation_penalties/*.*",
    "13_reality_checks": "**/[0-9][0-9]_*/*.csv",
}
LAST = "13_reality_checks"  # reads what the other notebooks of the same run make
EXPLAINED = {
    "04_cross_architecture_transfer": cross_architecture.explained,
    "07_bam": bam_study.explained,
    "14_explorer": lambda settings, dataset: [],  # maps are made for the image that is looked at
}
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Job:
    """One notebook with one set of parameters.

    Attributes
    ----------
    name : str
        What it is called in messages.
    source : Path
        The notebook.
    target : Path
        Where the executed notebook is kept.
    figures : Path
        The folder its figures go to.
    parameters : dict[str, Any]
        What papermill injects.
    inputs : dict[str, Any]
        Everything the result depends on, by name; a finished run with the same inputs is not repeated.
    timeout : float
        Seconds after which it is given up.
    cwd : str
        Folder it runs in.
    environment : dict[str, str]
        Environment variables it gets besides those of the process that runs it.
    reads : tuple[Path, str] | None
        A folder and a pattern: files that other jobs make and that the result depends on too.
    last : bool
        Whether it waits for the other jobs of a run, because it reads what they make.
    """

    name: str
    source: Path
    target: Path
    figures: Path
    parameters: dict[str, Any]
    inputs: dict[str, Any]
    timeout: float = 6 * 3600
    cwd: str = field(default_factory=os.getcwd)
    environment: dict[str, str] = field(default_factory=lambda: {"HARMONIZE_CACHE": str(paths.CACHE)})
    reads: tuple[Path, str] | None = None
    last: bool = False

    @property
    def status(self) -> Path:
        """Written last, and only here: what says that the run finished."""
        return self.target.with_suffix(".status.json")


class Outcome(NamedTuple):
    """What became of a job.

    Attributes
    ----------
    state : str
        ``"finished"``, ``"unchanged"`` (not run again), ``"failed"`` or ``"interrupted"``.
    cell : int | None
        n of ``In [n]`` in the kept notebook, where it stopped.
    error : str
        One line; empty where there is none.
    notes : tuple[str, ...]
        What the notebook warned of that concerns the store.
    """

    state: str
    cell: int | None = None
    error: str = ""
    notes: tuple[str, ...] = ()


class Maps(NamedTuple):
    """One shard of the maps of one model by one method, for a notebook whose parameters are JSON: the smallest unit."""

    notebook: str
    parameters: str
    explained: int
    model: str
    method: str
    shard: int


def study_job(notebook: str, values: Mapping[str, Any], figures: Path, timeout: float) -> Job:
    """A job for a notebook of the study, its parameters checked.

    Parameters
    ----------
    notebook : str
        A key of ``parameters.NOTEBOOKS``.
    values : Mapping[str, Any]
        Parameters that are not the defaults.
    figures : Path
        The figures folder; an executed notebook is kept beside its figures, those of the repository in ``runs/``.
    timeout : float
        Seconds after which it is given up.

    Returns
    -------
    Job
        The job.

    Raises
    ------
    HarmonizeError
        A parameter that will not do, or a notebook without a proper ``parameters`` cell.
    """
    settings = check(notebook, values)
    source = paths.NOTEBOOKS / f"{notebook}.ipynb"
    check_cell(source, NOTEBOOKS[notebook].model_fields)
    kept = paths.ROOT / "runs" if figures == paths.ROOT / "figures" else figures
    read_from = figures if notebook == LAST else paths.FIGURES.resolve()
    return Job(
        name=notebook,
        source=source,
        target=kept / source.name,
        figures=figures / notebook,
        parameters=dict(values) | {"output": str(figures)},
        inputs=inputs_of(source, settings.model_dump(exclude={"output"})),
        timeout=timeout,
        reads=(read_from, READS[notebook]) if notebook in READS else None,
        last=notebook == LAST,
    )


def check_cell(notebook: Path, names: Iterable[str]) -> None:
    """Check that papermill can set the parameters of a notebook.

    Parameters
    ----------
    notebook : Path
        The notebook.
    names : Iterable[str]
        The parameters it must have.

    Raises
    ------
    HarmonizeError
        No such file, no notebook, not exactly one cell tagged ``parameters``, or other names in it.
    """
    cells = [cell for cell in _read(notebook).cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise HarmonizeError(f"{notebook.name} has {len(cells)} cells tagged 'parameters': it needs exactly one")
    there = re.findall(r"^(\w+)\s*[:=]", cells[0].source, re.MULTILINE)
    wrong = sorted(set(there) ^ set(names))
    if wrong:
        raise HarmonizeError(f"{notebook.name}: its parameters cell and its declared parameters differ in {wrong[0]!r}")


def _read(notebook: Path) -> Any:
    if not notebook.is_file():
        raise HarmonizeError(f"no notebook {notebook.name}: restore notebooks/ from the repository")
    try:
        return nbformat.read(notebook, as_version=4)
    except Exception as error:
        raise HarmonizeError(f"{notebook.name} is not a readable notebook: restore it from the repository") from error


def inputs_of(notebook: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the result of a notebook depends on.

    Parameters
    ----------
    notebook : Path
        The notebook; its code counts, its outputs do not.
    parameters : Mapping[str, Any]
        All its parameters, defaults included.

    Returns
    -------
    dict[str, Any]
        Parameters, hashes of code, library and weights, versions, and what files that parameters name look like.
    """
    code = [cell.source for cell in _read(notebook).cells if cell.cell_type == "code"]
    return {
        "parameters": dict(parameters),
        "notebook": sha256_json(code),
        **_installation(paths.ROOT, paths.WEIGHTS),
        "files": {text: _listing(text) for text in sorted(_texts(parameters))},
    }


@lru_cache
def _installation(root: Path, weights: Path) -> dict[str, Any]:
    modules = [path for path in (root / "harmonize_lib").glob("*.py") if path.name not in NOT_READ_BY_NOTEBOOKS]
    trained = [path for path in weights.glob("*") if path.suffix in (".json", ".safetensors")]
    return {
        "library": sha256_json({path.name: sha256_file(path) for path in modules}),
        "weights": sha256_json({path.name: sha256_file(path) for path in trained}),
        "versions": {package: version(package) for package in (*PACKAGES, "papermill")},
    }


def _texts(value: Any) -> set[str]:
    """Texts among parameters that name something outside the repository: with a colon or a question mark."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(_texts, value))
    return {value} if isinstance(value, str) and re.search("[:?]", value) else set()


def _listing(text: str) -> str:
    """Names, sizes and times of the files a parameter names; code that may change unseen never looks the same."""
    if text.startswith("python:"):
        return f"as of {time.time_ns()}"
    found = []
    for part in re.split("[:?&=]", text):
        path = Path(part).expanduser()
        if part and path.exists():
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            found += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return sha256_json(found)


def _inputs_now(job: Job) -> dict[str, Any]:
    """The inputs of a job with the hashes of the files it reads, which may change until it starts."""
    if job.reads is None:
        return job.inputs
    folder, pattern = job.reads
    files = [path for path in sorted(folder.glob(pattern)) if job.figures not in path.parents]
    return job.inputs | {"read": {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}}


def is_unchanged(job: Job) -> bool:
    """Whether a job finished before with the same inputs, and everything it made is still as it was.

    Parameters
    ----------
    job : Job
        The job.

    Returns
    -------
    bool
        By its status file, which nothing but a finished run writes.
    """
    try:
        told = json.loads(job.status.read_text())
        same = told["state"] == "finished" and told["inputs"] == _inputs_now(job) and job.target.is_file()
        return same and all(sha256_file(job.figures / name) == digest for name, digest in told["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_notebook(job: Job, show: Callable[[str], None] | None = None) -> Outcome:
    """Run one notebook in a child process, keep what came of it, and write its status last.

    Parameters
    ----------
    job : Job
        The job.
    show : Callable[[str], None] | None
        Gets papermill's progress line whenever it changes.

    Returns
    -------
    Outcome
        ``finished``, ``failed``, or ``interrupted`` by Ctrl-C.

    Notes
    -----
    Kernels compute on one thread: floating-point sums depend on the number of threads, and results must not depend
    on how many notebooks run at once. ``OMP_NUM_THREADS`` overrules that. They keep the memory they free: a pass over
    a batch takes and frees hundreds of megabytes, and Dask has its workers give these back each time, which can cost
    more than the computation.
    """
    job.target.parent.mkdir(parents=True, exist_ok=True)
    job.status.unlink(missing_ok=True)
    before, inputs, began = _stamps(job.figures), _inputs_now(job), time.monotonic()
    order = {"source": str(job.source), "target": str(job.target), "parameters": job.parameters}
    child = subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", execution.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=job.cwd,
        env=ONE_THREAD | dict(os.environ) | KEEP_MEMORY | job.environment,
        start_new_session=True,  # Ctrl-C reaches this process, which tells the child
        text=True,
    )
    told: list[str] = []
    reader = threading.Thread(target=_listen, args=(child, told, show), daemon=True)
    reader.start()
    _tell(child, json.dumps(order))
    reason, state = "", "failed"
    try:
        child.wait(job.timeout)
    except subprocess.TimeoutExpired:
        reason = f"stopped: it took longer than {job.timeout:g} s"
    except KeyboardInterrupt:
        reason, state = "interrupted by Ctrl-C", "interrupted"
    if reason:
        _tell(child, reason)
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
    result = _result(job, child, told, reason)
    if result["state"] != "finished":
        return Outcome(state, result["cell"], result["error"])
    files = [path for path, stamp in _stamps(job.figures).items() if before.get(path) != stamp]
    hashes = {path.relative_to(job.figures).as_posix(): sha256_file(path) for path in sorted(files)}
    seconds = round(time.monotonic() - began, 1)
    status = {"notebook": job.name, "state": "finished", "inputs": inputs, "files": hashes, "seconds": seconds}
    write_atomic(job.status, json.dumps(status, indent=1) + "\n")
    return Outcome("finished", notes=_notes(job.target))


def _run_unless_done(job: Job, show: Callable[[str], None] | None = None) -> Outcome:
    """As a unit of Dask, which may repeat it: what another worker finished before it died is not run again."""
    return Outcome("finished", notes=_notes(job.target)) if is_unchanged(job) else run_notebook(job, show)


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def _listen(child: subprocess.Popen[str], told: list[str], show: Callable[[str], None] | None) -> None:
    for line in child.stderr or ():  # the progress bar's carriage returns count as line ends
        if line.startswith("Executing:"):
            if show:
                show(line.strip()[10:])
        elif line.strip():
            told.append(line.strip())


def _tell(child: subprocess.Popen[str], line: str) -> None:
    try:
        child.stdin.write(f"{line}\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
    except BrokenPipeError:
        pass  # it is gone already; its result, or the want of one, says why


def _result(job: Job, child: subprocess.Popen[str], told: list[str], reason: str) -> dict[str, Any]:
    """What the child said, or, where it could not, what is to be said of it."""
    said = child.communicate()[0].splitlines()
    if said:
        return json.loads(said[-1])
    code = child.returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}: {(told or ['no message'])[-1]}"
    error = reason or f"the process that executed it ended {how}"
    return execution.keep_failed(job.source, _partial(job), job.target, error)


def _partial(job: Job) -> Path:
    return job.target.with_suffix(".partial.ipynb")


def _notes(notebook: Path) -> tuple[str, ...]:
    """Warnings of the store among a notebook's outputs."""
    outputs = [output for cell in nbformat.read(notebook, as_version=4).cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stderr")
    return tuple(dict.fromkeys(re.findall(r"stored \w+ \w+ is corrupt: computing it again", text)))


def in_one_line(job: Job, outcome: Outcome) -> str:
    """Say what became of a job that did not finish.

    Parameters
    ----------
    job : Job
        The job.
    outcome : Outcome
        What became of it.

    Returns
    -------
    str
        Notebook, cell and error, at most 200 characters.
    """
    place = f"In [{outcome.cell}]: " if outcome.cell else ""
    line = f"{outcome.state}: {job.name}: {place}{outcome.error}"
    return line if len(line) <= 200 else line[:197] + "..."


def run_jobs(
    jobs: Sequence[Job],
    workers: int = 1,
    scheduler: str | None = None,
    maps: Sequence[Maps] = (),
    tell: Callable[[Job, Outcome], None] = lambda job, outcome: None,
) -> list[Outcome]:
    """Run jobs one after the other, on local worker processes, or on a Dask cluster; the failed do not stop the rest.

    Jobs that are ``last`` start when all others have ended.

    Parameters
    ----------
    jobs : Sequence[Job]
        The jobs; on a cluster one that is finished and unchanged is not repeated.
    workers : int
        Local worker processes; with one, no cluster is started.
    scheduler : str | None
        Address of a running Dask scheduler, e.g. ``tcp://127.0.0.1:8786``, whose workers share this file system.
    maps : Sequence[Maps]
        Maps to compute first; ignored where no cluster is used, because notebooks compute what is missing.
    tell : Callable[[Job, Outcome], None]
        Called when a job ends.

    Returns
    -------
    list[Outcome]
        One per job. After Ctrl-C those that did not finish are ``interrupted``.

    Raises
    ------
    HarmonizeError
        See :func:`connect`.
    """
    outcomes: dict[str, Outcome] = {}

    def end(job: Job, outcome: Outcome) -> None:
        outcomes[str(job.target)] = outcome
        tell(job, outcome)

    workers = min(workers, max(len(jobs), len(maps)))
    stages = [[job for job in jobs if not job.last], [job for job in jobs if job.last]]
    if scheduler is None and workers <= 1:
        _one_by_one(stages[0] + stages[1], end)
    else:
        began = time.time()
        try:
            with _cluster(workers, scheduler) as client:
                done = _completed(client, compute_maps, maps)
                with tqdm(done, total=len(maps), desc="maps", disable=not maps) as bar:
                    for unit, result in bar:
                        if isinstance(result, Outcome):  # the notebook that needs it will say what is wrong
                            bar.write(f"maps of {unit.model} by {unit.method}: {result.error}"[:200], file=sys.stderr)
                with tqdm(total=len(jobs), desc="notebooks", unit="notebook") as bar:
                    for stage in stages:
                        for job, result in _completed(client, _run_unless_done, stage):
                            bar.set_postfix_str(f"{job.name} {result.state}", refresh=False)
                            bar.update()
                            end(job, result)
        except KeyboardInterrupt:
            for job in jobs:
                if str(job.target) not in outcomes:
                    end(job, _interrupted(job, began))
    return [outcomes.get(str(job.target), Outcome("interrupted", None, "not started")) for job in jobs]


def _one_by_one(jobs: Sequence[Job], end: Callable[[Job, Outcome], None]) -> None:
    width = 110
    with tqdm(jobs, desc="notebooks", unit="notebook") as bar:
        for job in bar:
            bar.set_postfix_str(job.name)

            def show(line: str, name: str = job.name) -> None:
                sys.stderr.write("\r" + f"{name} {line}"[:width].ljust(width))
                sys.stderr.flush()

            outcome = _run_unless_done(job, show) if job.last else run_notebook(job, show)
            sys.stderr.write("\r" + " " * width + "\r")
            end(job, outcome)
            if outcome.state == "interrupted":
                break


@contextmanager
def _cluster(workers: int, scheduler: str | None) -> Iterator[Any]:
    """A client of the scheduler, or of a cluster of single-threaded local processes."""
    import dask
    from distributed import Client, LocalCluster

    _quiet()
    if scheduler is None:
        quiet = {"silence_logs": logging.CRITICAL, "dashboard_address": None, "memory_limit": 0}
        with (
            dask.config.set({"distributed.nanny.pre-spawn-environ": ONE_THREAD | KEEP_MEMORY}),
            LocalCluster(workers, threads_per_worker=1, host="127.0.0.1", **quiet) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    with connect(scheduler) as client:
        yield client


def connect(scheduler: str) -> Any:
    """Connect to a running Dask scheduler.

    Parameters
    ----------
    scheduler : str
        Its address, e.g. ``tcp://127.0.0.1:8786``.

    Returns
    -------
    Any
        A ``distributed.Client``.

    Raises
    ------
    HarmonizeError
        It is no address, no scheduler answers, it has no workers, or a worker has not the library, weights and versions
        of packages of this process.
    """
    from distributed import Client

    _quiet()
    address, place = scheduler[:60], ADDRESS.fullmatch(scheduler)
    if place is None:
        raise HarmonizeError(f"--scheduler {address}: write tcp://HOST:PORT, e.g. tcp://127.0.0.1:8786")
    try:  # a closed port answers at once, while Dask knocks until its time is over
        socket.create_connection((place["host"].strip("[]"), int(place["port"])), CONNECT_SECONDS).close()
        client = Client(scheduler, timeout=CONNECT_SECONDS)
    except Exception as error:
        line = f"no Dask scheduler answers at {address}: start one with 'dask scheduler', or leave --scheduler out"
        raise HarmonizeError(line) from error
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except Exception as error:
        client.close()
        raise HarmonizeError(f"{address} has no workers: start some with 'dask worker {address}'") from error
    for worker, has in client.run(_installed, on_error="return").items():
        if has != _installed():
            client.close()
            what = (
                "cannot import this library"
                if isinstance(has, Exception)
                else "has another library, weights or packages"
            )
            raise HarmonizeError(f"{worker} {what}: start it anew with the 'dask worker' of this environment")
    return client


def _installed() -> dict[str, Any]:
    return _installation(paths.ROOT, paths.WEIGHTS)


def _quiet() -> None:
    for name in ("distributed", "tornado", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _completed(client: Any, function: Callable[[Any], Any], units: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Units with their results as they come; a unit that could not be done has a failed outcome as result.

    Every worker has one unit: Dask, given all of them, would hand them out at once, short ones behind long ones.
    """
    from distributed import as_completed

    waiting, running = list(reversed(units)), as_completed(raise_errors=False)
    futures: dict[Any, Any] = {}

    def fill() -> None:
        while waiting and len(futures) < max(1, sum(client.nthreads().values())):
            unit = waiting.pop()
            future = client.submit(function, unit, pure=False)
            futures[future] = unit
            running.add(future)

    fill()
    for future in running:
        unit = futures.pop(future)  # a result that is kept on a worker is computed again when that worker dies
        if future.status == "finished":
            fill()
            yield unit, future.result()
        elif future.status == "error":
            fill()
            error = future.exception()
            killed = type(error).__name__ == "KilledWorker"
            line = "its worker was killed again and again" if killed else f"{type(error).__name__}: {error}"
            yield unit, Outcome("failed", None, line.splitlines()[0])
        else:
            yield unit, Outcome("failed", None, "the Dask scheduler went away")
    for unit in reversed(waiting):
        yield unit, Outcome("failed", None, "the Dask scheduler went away")


def _interrupted(job: Job, began: float) -> Outcome:
    """What a notebook that ran on a worker when Ctrl-C came has left, once its process has ended."""
    try:
        with FileLock(str(execution.lock_of(job.target)), timeout=STOP_SECONDS):
            if _partial(job).exists():
                result = execution.keep_failed(job.source, _partial(job), job.target, "interrupted by Ctrl-C")
                return Outcome("interrupted", result["cell"], result["error"])
            if job.target.exists() and job.target.stat().st_mtime >= began:
                result = nbformat.read(job.target, as_version=4).metadata.get("harmonize", {})
                return Outcome("interrupted", result.get("cell"), result.get("error", "interrupted"))
    except Timeout:
        return Outcome("interrupted", None, "still running on its worker")
    return Outcome("interrupted", None, "not started")


@lru_cache(maxsize=2)
def _dataset(name: str, n: int, seed: int) -> Dataset:
    return load_dataset(name, "test", n, seed)


@lru_cache(maxsize=16)
def _model(spec: str, device: str) -> Model:
    return load_model(spec, device=device)


def preflight(settings: Any) -> None:
    """Load what a notebook will load, so that a mistake is told before anything starts.

    Parameters
    ----------
    settings : Any
        Checked parameters of a notebook.

    Raises
    ------
    HarmonizeError
        A method, model, data set or device that is not there, a model of other classes than the data's, or a patch that
        does not divide the images.
    """
    if hasattr(settings, "table"):
        load_table(settings.table, settings.outcome, settings.horizon)
        load_pixels(settings.pixels, settings.pixel_images, settings.seed)
    if hasattr(settings, "digits"):
        sizes = settings.n_train, settings.n_validation, settings.n_test
        penalty_study.load(settings.digits, *sizes, settings.seed)
    models = [_model(spec, settings.device) for spec in getattr(settings, "models", [])]
    if hasattr(settings, "judges"):
        consensus_training.plan({model.name: model for model in models}, settings.fine_tuned, settings.judges)
    if not hasattr(settings, "dataset"):
        return
    dataset = _dataset(settings.dataset, settings.n_images, settings.seed)
    for model in models:
        study.check_classes(model, dataset)
    patch, side = getattr(settings, "patch", 1), dataset.images.shape[-1]
    if side % patch:
        fits = ", ".join(str(k) for k in range(1, side + 1) if side % k == 0)
        raise HarmonizeError(f"patch={patch} does not divide images of {side} pixels: use one of {fits}"[:200])


@lru_cache(maxsize=2)
def _explained(notebook: str, values: str) -> list[tuple[str, Dataset]]:
    """Models and what they are shown, of a notebook with these parameters, as JSON."""
    settings = check(notebook, json.loads(values))
    explained = EXPLAINED.get(notebook, study.explained)
    return list(explained(settings, _dataset(settings.dataset, settings.n_images, settings.seed)))


def missing_maps(all_settings: Iterable[Any]) -> list[Maps]:
    """Maps that notebooks will need and that are not in the store.

    Parameters
    ----------
    all_settings : Iterable[Any]
        Checked parameters of notebooks.

    Returns
    -------
    list[Maps]
        Each once.
    """
    names = {kind: name for name, kind in NOTEBOOKS.items()}
    wanted: dict[Path, Maps] = {}
    for settings in all_settings:
        if not isinstance(settings, Study):
            continue
        notebook, values = names[type(settings)], settings.model_dump_json()
        for i, (spec, dataset) in enumerate(_explained(notebook, values)):
            model = _model(spec, settings.device)
            for method in settings.methods:
                if refusal(model, method) is None:
                    options = settings.options.get(method, {})
                    for shard, place in study.missing_shards(model, dataset, method, settings.seed, **options).items():
                        wanted.setdefault(place, Maps(notebook, values, i, spec, method, shard))
    return list(wanted.values())


_one_at_a_time = threading.Lock()  # models are shared by the threads of a worker, and methods put hooks on them


def _asked(unit: Maps) -> tuple[Any, Model, Dataset, dict[str, Any]]:
    """Settings, model, the shard's images, and options of a unit."""
    settings = check(unit.notebook, json.loads(unit.parameters))
    spec, dataset = _explained(unit.notebook, unit.parameters)[unit.explained]
    part = dataset.select(torch.arange(len(dataset)).split(study.CHUNK)[unit.shard])
    return settings, _model(spec, settings.device), part, settings.options.get(unit.method, {})


def compute_maps(unit: Maps) -> None:
    """Compute one shard of maps and leave it in the store.

    Parameters
    ----------
    unit : Maps
        Which.
    """
    with _one_at_a_time:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as in run_notebook
        settings, model, part, options = _asked(unit)
        study.attributions(model, part, unit.method, settings.seed, **options)


def seconds_of_shard(unit: Maps, probe: int = 1) -> float:
    """Seconds a shard of maps takes here, from explaining a few of its images.

    Parameters
    ----------
    unit : Maps
        Which.
    probe : int
        Images tried. So few waste room in a pass, so the estimate errs upward.

    Returns
    -------
    float
        Seconds.
    """
    _, model, part, options = _asked(unit)
    result = explain(model, part.images[:probe], part.labels[:probe], unit.method, **options)
    return result.record["seconds"] / len(result.maps) * len(part)
