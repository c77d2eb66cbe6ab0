"""Runs tell the truth: real kernels that are killed, hang, raise, are interrupted or never start, and Dask workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from harmonize_lib import HarmonizeError, bam_study, paths, runner, study
from harmonize_lib.parameters import NOTEBOOKS, check
from harmonize_lib.reality_checks import CHECKS, THIS
from harmonize_lib.runner import Job, Outcome, in_one_line, is_unchanged, run_jobs, run_notebook
from harmonize_lib.storage import write_atomic

SAVE = """
import pathlib
folder = pathlib.Path(output)
folder.mkdir(exist_ok=True)
(folder / "x.csv").write_text(f"{x}\\n")
"""
COUNT = "with open(log, 'a') as file:\n    file.write('ran\\n')"
KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
SLEEP = "import time\ntime.sleep(600)"


def job(folder: Path, name: str, *cells: str, kernel: str = "python3", timeout: float = 600, x: int = 1) -> Job:
    """A notebook that counts its runs, does what the cells say, and then saves a table."""
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}}
    )
    book.cells = [
        nbformat.v4.new_markdown_cell("# A small notebook"),
        nbformat.v4.new_code_cell("x = 0\noutput = ''\nlog = ''", metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(cell) for cell in (COUNT, *cells, SAVE)),
    ]
    source = folder / f"source_{name}.ipynb"
    nbformat.write(book, source)
    values = {"x": x, "output": str(folder / name), "log": str(folder / f"{name}.log")}
    return Job(name, source, folder / f"{name}.ipynb", folder / name, values, {"x": x}, timeout)


def ran(one: Job) -> int:
    log = Path(one.parameters["log"])
    return len(log.read_text().splitlines()) if log.exists() else 0


def saved(one: Job) -> dict:
    """What the kept notebook says of itself; nothing half-written lies beside it."""
    assert not one.target.with_suffix(".partial.ipynb").exists()
    book = nbformat.read(one.target, as_version=4)
    nbformat.validate(book)
    return book


def says_failed(one: Job, cell: int | None, error: str) -> None:
    book = saved(one)
    assert book.metadata["harmonize"]["state"] == "failed" and book.metadata["harmonize"]["cell"] == cell
    assert error in book.metadata["harmonize"]["error"] and book.metadata["papermill"]["exception"] is True
    code = [c.metadata["papermill"]["status"] for c in book.cells if c.cell_type == "code"]
    done = 0 if cell is None else cell - 1
    assert code[:done] == ["completed"] * done and code[done] == ("pending" if cell is None else "failed")
    assert set(code[done + 1 :]) <= {"pending"}
    assert not one.status.exists() and not is_unchanged(one)


def test_each_failure_is_named_the_others_finish_and_only_what_is_missing_runs_again(tmp_path):
    began = time.monotonic()
    assert run_notebook(job(tmp_path, "first")).state == "finished"
    limit = round(5 + 3 * (time.monotonic() - began))  # long enough to reach the cell that hangs
    jobs = [
        job(tmp_path, "raises", "1 / 0"),
        job(tmp_path, "killed", KILL),
        job(tmp_path, "leaves", "import sys\nsys.exit(0)"),
        job(tmp_path, "hangs", SLEEP, timeout=limit),
        job(tmp_path, "good"),
    ]
    told = []
    outcomes = run_jobs(jobs, tell=lambda one, outcome: told.append(in_one_line(one, outcome)))
    assert [outcome.state for outcome in outcomes] == ["failed"] * 4 + ["finished"]
    assert told[:4] == [
        "failed: raises: In [4]: ZeroDivisionError: division by zero",
        "failed: killed: In [4]: the kernel died: it was killed, perhaps for want of memory",
        "failed: leaves: In [4]: stopped before its end without an error (sys.exit?)",
        f"failed: hangs: In [4]: stopped: it took longer than {limit} s",
    ]
    for one, error in zip(
        jobs, ("ZeroDivisionError", "kernel died", "sys.exit", f"longer than {limit} s"), strict=False
    ):
        says_failed(one, 4, error)
    assert "harmonize" not in saved(jobs[4]).metadata
    status = json.loads(jobs[4].status.read_text())
    assert list(status["files"]) == ["x.csv"] and status["inputs"] == {"x": 1}

    mended = [job(tmp_path, one.name) for one in jobs]
    todo = [one for one in mended if not is_unchanged(one)]
    assert [one.name for one in todo] == ["raises", "killed", "leaves", "hangs"]
    assert [outcome.state for outcome in run_jobs(todo)] == ["finished"] * 4
    assert all(map(is_unchanged, mended)) and [ran(one) for one in mended] == [2, 2, 2, 2, 1]


def test_what_has_changed_is_not_unchanged(tmp_path):
    one = job(tmp_path, "a")
    assert run_notebook(one).state == "finished" and is_unchanged(one)
    assert not is_unchanged(job(tmp_path, "a", x=2))
    table = tmp_path / "a" / "x.csv"
    table.write_text("2\n")
    assert not is_unchanged(one)
    table.write_text("1\n")
    assert is_unchanged(one)
    table.unlink()
    assert not is_unchanged(one)
    assert run_notebook(one).state == "finished" and is_unchanged(one)
    one.status.write_text(one.status.read_text()[:-20])
    assert not is_unchanged(one)


def test_a_kernel_that_dies_at_its_start_and_one_that_does_not_exist(tmp_path, monkeypatch):
    kernel = tmp_path / "jupyter" / "kernels" / "stillborn"
    kernel.mkdir(parents=True)
    started = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')"
    (kernel / "kernel.json").write_text(
        json.dumps(
            {"argv": [sys.executable, "-c", started, "{connection_file}"], "display_name": "s", "language": "python"}
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    stillborn, absent = job(tmp_path, "stillborn", kernel="stillborn"), job(tmp_path, "absent", kernel="no-such-kernel")
    outcomes = run_jobs([stillborn, absent])
    assert in_one_line(stillborn, outcomes[0]) == "failed: stillborn: the kernel died at its start"
    assert outcomes[1].error.startswith("NoSuchKernel")
    says_failed(stillborn, None, "died at its start")
    says_failed(absent, None, "NoSuchKernel")
    assert (tmp_path / "starts").read_text() == "xx"  # tried twice


def test_a_killed_child_leaves_a_stamped_notebook_and_no_kernel(tmp_path):
    """The process that executes is killed in the middle of a cell, from inside."""
    one = job(tmp_path, "orphan", "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)")
    outcome = run_notebook(one)
    assert in_one_line(one, outcome) == "failed: orphan: In [4]: the process that executed it ended by SIGKILL"
    says_failed(one, 4, "SIGKILL")


SCRIPT = """
import json, sys
from pathlib import Path
from harmonize_lib.runner import Job, Outcome, in_one_line, run_jobs
jobs = [Job(a, *map(Path, b), *c) for a, b, c in json.loads(sys.argv[1])]
print("begun", flush=True)
for job, outcome in zip(jobs, run_jobs(jobs, workers=int(sys.argv[2]))):
    print(in_one_line(job, outcome), flush=True)
"""


def in_a_process(jobs: list[Job], workers: int = 1) -> subprocess.Popen[str]:
    told = [
        (j.name, [str(j.source), str(j.target), str(j.figures)], [j.parameters, j.inputs, j.timeout, j.cwd])
        for j in jobs
    ]
    command = [sys.executable, "-c", SCRIPT, json.dumps(told), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_the_notebook_and_says_where(tmp_path, workers):
    jobs = [job(tmp_path, "good"), job(tmp_path, "slow", SLEEP), job(tmp_path, "later")]
    jobs = jobs if workers == 1 else jobs[:2]
    process = in_a_process(jobs, workers)
    wait_for(lambda: ran(jobs[1]) and is_unchanged(jobs[0]))
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=120)
    lines = out.splitlines()[1:]
    assert lines[0].startswith("finished: good") and "Traceback" not in out
    assert lines[1].startswith("interrupted: slow: In [4]: interrupted")
    assert lines[2:] == (["interrupted: later: not started"] if workers == 1 else [])
    says_failed(jobs[1], 4, "interrupted")


def test_when_everything_is_killed_the_next_run_completes_what_is_missing(tmp_path):
    jobs = [job(tmp_path, "good"), job(tmp_path, "slow", "import time\ntime.sleep(0 if x == 2 else 600)")]
    process = in_a_process(jobs)
    wait_for(lambda: ran(jobs[1]))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert is_unchanged(jobs[0]) and not is_unchanged(jobs[1])
    again = job(tmp_path, "slow", "import time\ntime.sleep(0 if x == 2 else 600)", x=2)
    assert run_notebook(again).state == "finished"  # waits until the killed run's process has let go
    assert saved(again) and is_unchanged(again) and (tmp_path / "slow" / "x.csv").read_text() == "2\n"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def listens(address: str) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0


@contextmanager
def dask(*arguments: str, **environment: str):
    command = [sys.executable, "-m", "dask", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | environment, **quiet)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_an_external_scheduler_and_a_worker_killed_half_way(tmp_path):
    """The killed worker's notebook runs again on the other worker; what was finished does not."""
    address = f"tcp://127.0.0.1:{free_port()}"
    slow = "import time, pathlib\nif len(open(log).readlines()) == 1:\n    time.sleep(600)"
    jobs = [job(tmp_path, "a"), job(tmp_path, "b"), job(tmp_path, "slow", slow)]
    worker = ("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path))
    serve = ("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard")
    with dask(*serve), dask(*worker) as first:
        wait_for(lambda: listens(address))
        results: list[Outcome] = []
        thread = threading.Thread(target=lambda: results.extend(run_jobs(jobs, scheduler=address)))
        thread.start()
        wait_for(lambda: ran(jobs[2]))
        first.kill()
        with dask(*worker):
            thread.join(600)
            again = run_jobs(jobs, scheduler=address)
    assert [outcome.state for outcome in results] == [outcome.state for outcome in again] == ["finished"] * 3
    assert [ran(one) for one in jobs] == [1, 1, 2] and all(map(is_unchanged, jobs))


@pytest.mark.parametrize(
    ("at_start", "says"),
    [
        ("import sys; sys.modules['harmonize_lib'] = None", "cannot import this library"),
        (
            "from importlib import metadata; old = {'timm': '0.1'}; was = metadata.version\n"
            "metadata.version = lambda name: old.get(name) or was(name)",
            "has another library",
        ),
    ],
)
def test_a_worker_that_would_compute_with_something_else_is_refused(tmp_path, at_start, says):
    """Dask would wait for the first for ever, and file the results of the second as this library's."""
    (tmp_path / "sitecustomize.py").write_text(at_start)
    address = f"tcp://127.0.0.1:{free_port()}"
    serve = ("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard")
    worker = ("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path))
    with dask(*serve), dask(*worker, PYTHONPATH=str(tmp_path)):
        wait_for(lambda: listens(address))
        with pytest.raises(HarmonizeError, match=says) as error:
            run_jobs([job(tmp_path, "a")], scheduler=address)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) <= 200
    assert not (tmp_path / "a.ipynb").exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tcp://127.0.0.1:1", "no Dask scheduler answers at"),
        ("nonsense", "write tcp://HOST:PORT"),
        ("tcp://127.0.0.1:port", "write tcp://HOST:PORT"),
        ("tpc://127.0.0.1:8786", "write tcp://HOST:PORT"),
    ],
)
def test_an_unreachable_scheduler_is_one_line_within_15_seconds(tmp_path, address, says):
    start = time.monotonic()
    with pytest.raises(HarmonizeError, match=says) as error:
        run_jobs([job(tmp_path, "a")], scheduler=address)
    assert time.monotonic() - start < 15 and len(str(error.value).splitlines()) == 1 and len(str(error.value)) <= 200
    assert not (tmp_path / "a.ipynb").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_notebook_that_reads_what_others_make_runs_after_them_and_again_when_that_changes(tmp_path, workers):
    gather = "from pathlib import Path\n"
    gather += "x = [path.read_text() for path in sorted(Path(output).parent.glob('other*/x.csv'))]"
    reader = replace(job(tmp_path, "reader", gather), reads=(tmp_path, "*/x.csv"), last=True)
    others = [job(tmp_path, "other1", "import time\ntime.sleep(3)", x=5), job(tmp_path, "other2", x=6)]
    assert [outcome.state for outcome in run_jobs([reader, *others], workers)] == ["finished"] * 3
    assert (tmp_path / "reader" / "x.csv").read_text() == "['5\\n', '6\\n']\n" and is_unchanged(reader)
    assert set(json.loads(reader.status.read_text())["inputs"]["read"]) == {"other1/x.csv", "other2/x.csv"}
    run_jobs([reader], workers)
    assert ran(reader) == 1  # what it reads is the same
    (tmp_path / "other2" / "x.csv").write_text("7\n")
    assert not is_unchanged(reader)
    run_jobs([reader], workers)
    assert ran(reader) == 2 and "'7\\n'" in (tmp_path / "reader" / "x.csv").read_text() and is_unchanged(reader)


def test_notebook_13_depends_on_every_table_and_claim_it_reads(tmp_path):
    read = {(check.notebook, check.table) for check in CHECKS.values() if check.notebook != THIS}
    read |= {("05_harmonisation", "rules"), ("05_harmonisation", "by_rule"), ("07_bam", "harmonized_by_rule")}
    read |= {(notebook, "claims") for notebook in NOTEBOOKS if notebook != THIS}
    one = runner.study_job(THIS, {}, tmp_path, 1)
    assert one.last and not any(runner.study_job(name, {}, tmp_path, 1).last for name in NOTEBOOKS if name != THIS)
    seen = [runner._inputs_now(one)]
    for notebook, table in sorted(read):
        for text in ("1\n", "2\n"):
            write_atomic(tmp_path / notebook / f"{table}.csv", text)
            seen.append(runner._inputs_now(one))
    assert len({json.dumps(inputs) for inputs in seen}) == len(seen)
    write_atomic(tmp_path / THIS / "claims_ledger.csv", "1\n")  # its own
    assert runner._inputs_now(one) == seen[-1]


@pytest.mark.parametrize(
    ("notebook", "table"),
    [
        ("04_cross_architecture_transfer", "imagenet-sample/04_cross_architecture_transfer/curves.csv"),
        ("04_cross_architecture_transfer", "imagenet-sample/02_attribution_extraction/completeness.csv"),
        ("09_attribution_priors", "real-data/09_attribution_priors/claims.csv"),
        ("09_attribution_priors", "longer-training/09_attribution_priors/claims.csv"),
        ("11_explanation_penalties", "real-data/11_explanation_penalties/accuracy_selected.json"),
    ],
)
def test_runs_on_other_data_that_a_notebook_quotes_are_inputs(tmp_path, monkeypatch, notebook, table):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    one = runner.study_job(notebook, {}, tmp_path / "out", 1)
    before = runner._inputs_now(one)
    write_atomic(tmp_path / table, "1\n")
    assert set(runner._inputs_now(one)["read"]) == {*before["read"], table}


def test_the_parameters_cell_is_checked(tmp_path):
    one = job(tmp_path, "a")
    runner.check_cell(one.source, ["x", "output", "log"])
    with pytest.raises(HarmonizeError, match="differ in 'log'"):
        runner.check_cell(one.source, ["x", "output"])
    book = nbformat.read(one.source, as_version=4)
    del book.cells[1]
    nbformat.write(book, one.source)
    with pytest.raises(HarmonizeError, match="0 cells tagged 'parameters': it needs exactly one"):
        runner.check_cell(one.source, ["x"])
    with pytest.raises(HarmonizeError, match=r"no notebook b\.ipynb"):
        runner.check_cell(tmp_path / "b.ipynb", [])
    one.source.write_text("{")
    with pytest.raises(HarmonizeError, match="not a readable notebook"):
        runner.check_cell(one.source, [])


def test_files_that_parameters_name_count_among_the_inputs(tmp_path):
    one, photos = job(tmp_path, "a"), tmp_path / "photos"
    photos.mkdir()
    (photos / "1.png").write_bytes(b"1")
    values = {"dataset": f"imagefolder:{photos}", "n_images": 5}
    before = runner.inputs_of(one.source, values)
    assert before == runner.inputs_of(one.source, values)
    (photos / "2.png").write_bytes(b"2")
    assert before != runner.inputs_of(one.source, values)
    mine = {"models": ["resnet-obj", "python:my:model"]}
    assert runner.inputs_of(one.source, mine) != runner.inputs_of(one.source, mine)


def test_outputs_of_the_source_notebook_do_not_count_but_its_code_does(tmp_path):
    one = job(tmp_path, "a")
    before = runner.inputs_of(one.source, {})
    book = nbformat.read(one.source, as_version=4)
    book.cells[2].outputs = [nbformat.v4.new_output("stream", text="hello")]
    nbformat.write(book, one.source)
    assert runner.inputs_of(one.source, {}) == before
    book.cells[2].source += "\n"
    nbformat.write(book, one.source)
    assert runner.inputs_of(one.source, {}) != before


def test_braces_in_paths_are_no_format_strings(tmp_path):
    folder = tmp_path / "{x.__class__}"
    folder.mkdir()
    one = job(folder, "a")
    assert run_notebook(one).state == "finished" and sorted(p.name for p in tmp_path.iterdir()) == ["{x.__class__}"]


def test_maps_of_second_seeds_are_shared_out_where_a_notebook_needs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    few = {"n_images": 4, "models": ["resnet-obj", "vgg-obj"], "methods": ["saliency"]}
    units = runner.missing_maps([check("03_feature_images", few), check("04_cross_architecture_transfer", few)])
    assert [unit.model for unit in units] == ["resnet-obj", "vgg-obj", "resnet-obj-s1", "vgg-obj-s1"]
    for unit in units:
        runner.compute_maps(unit)
    assert runner.missing_maps([check("04_cross_architecture_transfer", few)]) == []


def test_bam_finds_all_maps_in_the_store_but_controls_and_those_under_patches(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    given = {"n_images": 4, "models": ["resnet-obj", "vgg-obj"], "methods": ["smoothgrad"], "patch_steps": 1}
    given |= {"relative_models": ["resnet-scene_k{k}"], "commonalities": [1], "n_relative": 3, "seed": 5}
    given |= {"harmonized_methods": ["smoothgrad"], "options": {"smoothgrad": {"samples": 2}}}
    settings = check("07_bam", given)
    units = runner.missing_maps([settings])
    shown = 2 + 2 + 2 + 2 + 2  # objects, scenes, scenes with the object gone (both kinds of model), two commonalities
    assert len(units) == shown and len({unit.model for unit in units}) == 8
    for unit in units:
        runner.compute_maps(unit)
    computed, explain = [], study._explain

    def noted(model, images, targets, method, *rest):
        computed.append(method)
        return explain(model, images, targets, method, *rest)

    monkeypatch.setattr(study, "_explain", noted)
    run = study.start("07_bam", given)
    bench = bam_study.prepare(run)
    assert not computed
    maps = bam_study.all_maps(run, bench)
    assert computed.count("smoothgrad") == 2 and ("scene only patched", "vgg-obj", "smoothgrad") in maps
    bam_study.relative_maps(run)
    assert computed.count("smoothgrad") == 2


def test_a_time_limit_holds_where_ctrl_c_is_ignored_as_in_the_background_of_a_script(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = run_notebook(job(tmp_path, "slow", SLEEP, timeout=30))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.state == "failed" and outcome.cell == 4 and "longer than 30 s" in outcome.error
