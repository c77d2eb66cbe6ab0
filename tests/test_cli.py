"""The command as a user types it: real processes, real notebooks, and mistakes answered in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from small import notebook

from harmonize_lib import HarmonizeError, cli, paths
from harmonize_lib.parameters import NOTEBOOKS

SMALL = ["-p", "models", "[resnet-obj, mobilenet-obj]", "-p", "methods=[saliency, integrated_gradients]"]
SMALL += ["-p", "n_images", "10"]


def harmonize(*arguments: str, cwd: Path | None = None, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from harmonize_lib.cli import main; main()", *arguments]
    environment = dict(os.environ) | ({"HARMONIZE_CACHE": str(cache)} if cache else {})
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def tables(folder: Path) -> dict[str, bytes]:
    """Tables and pictures."""
    files = [path for path in folder.rglob("*") if path.suffix in (".csv", ".svg")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One small run on one process, with a store of its own, from another folder."""
    folder = tmp_path_factory.mktemp("run")
    before = {path: path.stat().st_mtime_ns for path in (paths.ROOT / "figures").rglob("*") if path.is_file()}
    out, cache = str(folder / "figures"), folder / "cache"
    result = harmonize("run", "03", *SMALL, "--out", out, "--jobs", "1", cwd=folder, cache=cache)
    assert result.returncode == 0, result.stderr
    after = {path: path.stat().st_mtime_ns for path in (paths.ROOT / "figures").rglob("*") if path.is_file()}
    assert before == after  # nothing in the repository was touched
    return folder, result


def test_run_writes_figures_with_their_provenance(ran):
    folder, result = ran
    made = {path.stem for path in (folder / "figures" / "03_feature_images").glob("*.json")}
    assert {"fractions", "patch_and_fill", "architectures", "selectivity"} <= made
    for name in made:
        told = json.loads((folder / "figures" / "03_feature_images" / f"{name}.json").read_text())
        assert told["parameters"]["n_images"] == 10 and set(told["weights"]) == {"resnet-obj", "mobilenet-obj"}
    assert f"{len(made)} figures written" in result.stdout and "1 of 1 notebooks finished" in result.stdout


@pytest.fixture
def here(monkeypatch, capsys, ran):
    """The command in this process, with the store of the small run: exit code, stdout and stderr."""
    monkeypatch.setattr(paths, "CACHE", ran[0] / "cache")

    def said(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["harmonize", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return said


def test_run_again_has_nothing_to_do(ran, here):
    folder, _ = ran
    code, told, _ = here("run", "03", *SMALL, "--out", str(folder / "figures"), "--jobs", "1")
    assert code == 0 and "not run again, unchanged since they finished: 03" in told
    assert "1 of 1 notebooks finished" in told


def test_a_fresh_run_reuses_the_store_but_for_a_corrupt_shard_and_says_so(ran, here):
    folder, _ = ran
    there = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.safetensors")}
    shard = next(path for path in there if path.parents[1].name == "attribution")
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    shard.write_bytes(flipped)
    before = tables(folder / "figures")
    code, told, error = here("run", "03", *SMALL, "--out", str(folder / "figures"), "--jobs", "1", "--fresh")
    assert code == 0 and "not run again" not in told
    assert f"03_feature_images: stored attribution {shard.stem[:12]} is corrupt: computing it again" in error
    assert tables(folder / "figures") == before
    after = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.safetensors")}
    assert {path for path in after if after[path] != there.get(path)} == {shard}


def test_a_callable_in_the_folder_the_run_starts_in(tmp_path, ran):
    (tmp_path / "mine.py").write_text(
        "from harmonize_lib.models import load_model\n"
        "def build():\n    model = load_model('resnet-obj', device='cpu')\n"
        "    model.network.classes, model.network.input_size = model.classes, (64, 64)\n    return model.network\n"
    )
    models = "[python:mine:build, vgg-obj]"
    small = ("-p", "models", models, "-p", "methods", "[saliency]", "-p", "n_images", "4", "--jobs", "1")
    result = harmonize("run", "03", *small, "--out", "out", cwd=tmp_path, cache=ran[0] / "cache")
    assert result.returncode == 0, result.stderr
    told = json.loads((tmp_path / "out" / "03_feature_images" / "selectivity.json").read_text())
    assert set(told["weights"]) >= {"python:mine:build", "vgg-obj"}


def test_a_notebook_that_takes_too_long_is_named_and_the_exit_code_says_so(tmp_path, here):
    code, told, error = here("run", "03", *SMALL, "--out", str(tmp_path), "--timeout", "1", "--jobs", "1")
    assert code == 1 and "0 of 1 notebooks finished" in told
    assert "failed: 03_feature_images: " in error and "took longer than 1 s" in error
    assert "the ledger of claims was left as it is" in told and not (tmp_path / "claims.csv").exists()


ELSEWHERE = """
import sys
from pathlib import Path
from harmonize_lib import paths
from harmonize_lib.cli import main
paths.NOTEBOOKS = Path(sys.argv.pop(1))
main()
"""
TINY = ["-p", "n_images", "4", "-p", "models", "[resnet-obj, vgg-obj]", "-p", "methods=[saliency]", "--jobs", "1"]


@pytest.mark.parametrize(
    ("cell", "code", "says"),
    [
        ("1 / 0", 1, "failed: 03_feature_images: In [4]: ZeroDivisionError: division by zero"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1, "failed: 03_feature_images: In [4]: the kernel"),
        ("import time; open(output + '.begun', 'w'); time.sleep(600)", 130, "interrupted: 03_feature_images: In [4]:"),
    ],
    ids=["raises", "killed", "Ctrl-C"],
)
def test_exit_codes_of_runs_that_fail(tmp_path, ran, cell, code, says):
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook(cell), tmp_path / "notebooks" / "03_feature_images.ipynb")
    out, begun = tmp_path / "out", tmp_path / "out.begun"
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "notebooks"), "run", "03", *TINY, "--out", str(out)],
        env=dict(os.environ) | {"HARMONIZE_CACHE": str(ran[0] / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while code == 130 and not begun.exists() and process.poll() is None:
        time.sleep(0.1)
    if code == 130:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    told, error = process.communicate(timeout=300)
    assert process.returncode == code and says in error and "Traceback" not in error, error
    assert "0 of 1 notebooks finished" in told and not (out / "03_feature_images.status.json").exists()
    assert nbformat.read(out / "03_feature_images.ipynb", 4).metadata["harmonize"]["state"] == "failed"


@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize(
    ("address", "says"),
    [("tcp://127.0.0.1:1", "no Dask scheduler answers at"), ("tpc://127.0.0.1:8786", "write tcp://HOST:PORT")],
)
def test_an_unreachable_scheduler_is_told_within_15_seconds_and_leaves_no_folder(tmp_path, command, address, says):
    (tmp_path / "grid.yaml").write_text("notebook: 3\ngrid: {seed: [0, 1]}\n")
    what = ["run"] if command == "run" else ["sweep", "grid.yaml"]
    start = time.monotonic()
    done = harmonize(*what, "--out", "out", "--scheduler", address, cwd=tmp_path)
    assert time.monotonic() - start < 15
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr.strip()) <= 200
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "04", "-p", "n_images", "40"], "n_images = 40 is not the default"),
        (["run", "04", "-p", "seed=1", "--out", str(paths.ROOT / "figures")], "seed = 1 is not the default"),
        (["run", "03", "--profile", "paper"], "is not the default, which figures/ is made with: pass --out FOLDER"),
        (["train"], "pass --out FOLDER for the weights"),
        (["train", "resnet-obj"], "pass --out FOLDER for the weights"),
    ],
)
def test_what_is_committed_is_not_replaced_by_mistake(here, arguments, says):
    code, told, error = here(*arguments)
    assert code == 2 and told == ""
    assert says in error and len(error.strip().splitlines()) == 1 and len(error.strip()) <= 200


def test_parameters_that_are_the_defaults_go_to_the_committed_figures():
    cli._check_place(paths.ROOT / "figures", "04_cross_architecture_transfer", {"n_images": 100})
    with pytest.raises(HarmonizeError, match="n_images = 101"):
        cli._check_place(paths.ROOT / "figures", "04_cross_architecture_transfer", {"n_images": 101})


def test_verify_takes_the_folder_of_a_run(ran, here, tmp_path):
    place = shutil.copytree(ran[0] / "figures", tmp_path / "figures")
    code, told, _ = here("verify", str(place))
    assert code == 0 and " of 1 notebooks" in told and "every file is what its provenance says" in told
    (place / "03_feature_images" / "selectivity.csv").write_text("edited\n")
    code, _, error = here("verify", str(place))
    assert (
        code == 1
        and error == "03_feature_images/selectivity.csv: changed after the run that made it (sha256 differs)\n"
    )
    code, _, error = here("verify", str(tmp_path / "no"))
    assert code == 2 and "holds no executed notebook" in error and len(error.splitlines()) == 1


def test_cores_are_counted_where_a_process_has_no_affinity(monkeypatch):
    assert cli._cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert cli._cores() == os.cpu_count()


def test_a_sweep_on_two_workers_is_one_table_of_all_sets_and_jobs_do_not_change_a_byte(
    ran, here, tmp_path, monkeypatch
):
    """Maps are made anew, by workers; on two threads MobileNet's last digits would differ."""
    folder, _ = ran
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("HARMONIZE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "grid.yaml").write_text(
        "notebook: 3\ngrid: {seed: [0, 1]}\n"
        "base: {models: [resnet-obj, mobilenet-obj], methods: [saliency, integrated_gradients], n_images: 10}\n"
    )
    code, told, error = here("sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2")
    assert code == 0 and "2 of 2 parameter sets finished" in told
    assert "maps: 100%" in error and "notebooks: 100%" in error
    table = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert list(table.columns[:3]) == ["seed", "result", "what"] and set(table["seed"]) == {0, 1}
    for seed, part in table[table["result"] == "selectivity"].groupby("seed"):
        (one,) = (tmp_path / "out").glob(f"seed={seed}-*/03_feature_images/selectivity.csv")
        assert part["mean"].tolist() == pd.read_csv(one)["mean"].tolist()
    assert {"sweep.svg", "sweep.png", "sweep.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    (same,) = (tmp_path / "out").glob("seed=0-*")
    assert tables(same / "03_feature_images") == tables(folder / "figures" / "03_feature_images")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "07x"], "unknown notebook"),
        (["run", "no/such/04.ipynb"], "no such notebook"),
        (["run", "04", "-p", "n_image=5"], "did you mean 'n_images'"),
        (["run", "04", "-p", "n_image", "5"], "did you mean 'n_images'"),
        (["run", "04", "-p", "n_images=many"], "'n_images'"),
        (["run", "04", "-p", "n_images"], "write -p NAME VALUE"),
        (["run", "04", "-p", "n_images", "[1"], "no YAML"),
        (["run", "04", "-p", "dataset", "2020-01-01"], "no JSON value"),
        (["run", "04", "-p", "seed", "-1"], "'seed'"),
        (["run", "04", "-p", 'open("x","w").close(); z', "1"], "unknown parameter"),
        (["run", "04", "-p", "output", "elsewhere"], "--out"),
        (["run", "04", "-p", "patch", "7"], "patch=7 does not divide"),
        (["run", "04", "-p", "models", "[resnet-obj, vitt-obj]"], "did you mean 'vit-obj'"),
        (["run", "04", "-p", "methods", "[saliencey]"], "did you mean 'saliency'"),
        (["run", "04", "-p", "dataset", "imagefolder:no/such/folder"], "no such folder"),
        (["run", "05", "-p", "rules=3"], "'rules'"),
        (["run", "--profile", "papers"], "did you mean 'paper'"),
        (["run", "01", "--profile", "imagenet"], "has no parameters for 01_data_and_models"),
        (["run", "03", "--out", "/dev/null/x"], "give a folder that can be written"),
        (["run", "03", "--out", ""], "give a folder"),
        (["sweep", "no.yaml", "--out="], "give a folder"),
        (["export", "--out", ""], "give a folder"),
        (["train", "resnet-obj", "--out", ""], "give a folder"),
        (["run", "03", "--jobs", "0"], "'--jobs'"),
        (["run", "03", "--frsh"], "--fresh"),
        (["sweep", "no.yaml"], "no.yaml cannot be read"),
        (["sweep"], "Missing argument"),
        (["params", "99"], "unknown notebook '99'"),
        (["export", "99"], "unknown notebook '99'"),
        (["runn"], "No such command"),
        (["train", "resnet-object"], "no zoo name"),
        (["data", "shape-on-scenes"], "did you mean 'shapes-on-scenes'"),
        (["data", "imagefolder:no/such/folder"], "no such folder"),
        (["data", "--n", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2_and_leave_nothing(here, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    out = (
        []
        if any(a.startswith("--out") for a in arguments) or arguments[0] not in ("run", "sweep")
        else ["--out", str(tmp_path / "out")]
    )
    code, told, error = here(*arguments, *out)
    assert code == 2 and told == ""
    assert says in error and len(error.strip().splitlines()) == 1 and len(error.strip()) <= 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "params", "export"])
@pytest.mark.parametrize("name", ["04.ipynb", "04.py", "04_cross_architecture_transfer.ipynb"])
def test_a_copy_of_a_notebook_is_not_taken_for_the_repositorys(here, tmp_path, command, name):
    shutil.copy(paths.NOTEBOOKS / "04_cross_architecture_transfer.ipynb", tmp_path / name)
    if command == "export" and name.endswith(".ipynb"):
        return  # any notebook can be exported
    code, told, error = here(command, str(tmp_path / name))
    assert code == 2 and told == "" and "is no notebook of this repository" in error
    assert len(error.strip().splitlines()) == 1 and len(error.strip()) <= 200


def test_params_tells_name_type_default_range_and_meaning(here):
    code, told, _ = here("params", "4")
    assert code == 0
    for name, info in NOTEBOOKS["04_cross_architecture_transfer"].model_fields.items():
        assert f"\n{name}: " in told and f"\n    {info.description}\n" in told
        assert f" = {json.dumps(info.default)}" in told
    assert "n_images: whole number = 100   (≥ 2, ≤ 100000)" in told and "(one of mean, blur, road)" in told
    assert "list of number" in told and "each > 0, ≤ 1)" in told


def test_every_command_explains_itself(here):
    code, told, _ = here("--help")
    assert code == 0
    for name in ("run", "sweep", "params", "export", "train", "data", "doctor"):
        assert f"  {name} " in told
        code, help_, _ = here(name, "--help")
        assert code == 0 and "Usage: harmonize" in help_


def test_export_writes_pages(here, tmp_path, ran):
    kept = ran[0] / "figures" / "03_feature_images.ipynb"
    code, told, _ = here("export", str(kept), "--out", str(tmp_path / "html"))
    page = (tmp_path / "html" / "03_feature_images.html").read_text()
    assert code == 0 and "1 page written" in told
    assert page.startswith("<!DOCTYPE html>") and "image/png;base64" in page and "reproduced" in page


def test_data_says_what_it_holds(here):
    code, told, _ = here("data", "--n", "100")
    assert code == 0 and "10 classes" in told and "classes: rings disc; stripes" in told and "10 to 10" in told


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["-p", "a", "1"], ["-p", "a=1"]),
        (["-p", "a=1", "b"], ["-p", "a=1", "b"]),
        (["-p", "a", "-1", "-p", "b=c=d", "03"], ["-p", "a=-1", "-p", "b=c=d", "03"]),
        (["-p", "a", "--out", "x"], ["-p", "a", "--out", "x"]),
        (["-p", "a", "x=y", "z"], ["-p", "a=x=y", "z"]),
        (["03", "-p"], ["03", "-p"]),
    ],
)
def test_a_parameter_may_be_written_with_a_space_or_an_equals_sign(typed, meant):
    assert cli._joined(typed) == meant
