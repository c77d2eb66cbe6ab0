"""The command as a user types it: real processes, real notebooks, and mistakes answered in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from harmonize_lib import cli, paths
from harmonize_lib.parameters import NOTEBOOKS

SMALL = ["-p", "models", "[resnet-obj, mobilenet-obj]", "-p", "methods=[saliency, integrated_gradients]"]
SMALL += ["-p", "n_images", "10"]


def harmonize(*arguments: str, cwd: Path | None = None, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from harmonize_lib.cli import main; main()", *arguments]
    environment = dict(os.environ) | ({"HARMONIZE_CACHE": str(cache)} if cache else {})
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def tables(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.csv")}


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


def test_run_again_has_nothing_to_do_and_fresh_reuses_the_store(ran):
    folder, _ = ran
    stored = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.safetensors")}
    arguments = ("run", "03", *SMALL, "--out", str(folder / "figures"), "--jobs", "1")
    before = tables(folder / "figures")
    result = harmonize(*arguments, cache=folder / "cache")
    assert result.returncode == 0 and "not run again, unchanged since they finished: 03" in result.stdout
    result = harmonize(*arguments, "--fresh", cache=folder / "cache")
    assert result.returncode == 0 and "not run again" not in result.stdout
    assert stored == {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.safetensors")}
    assert tables(folder / "figures") == before


def test_jobs_do_not_change_a_byte(ran, tmp_path):
    """Maps made by workers, in a store of their own; two threads would change MobileNet's last digits."""
    folder, _ = ran
    result = harmonize("run", "03", *SMALL, "--out", str(tmp_path / "figures"), "--jobs", "2", cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert "maps and notebooks" in result.stderr and tables(tmp_path / "figures") == tables(folder / "figures")
    of = [
        {p.name: p.read_bytes() for p in (f / "cache" / "attribution").rglob("*.safetensors")}
        for f in (folder, tmp_path)
    ]
    assert of[0].keys() == of[1].keys() and len(of[0]) == 4


def test_a_corrupt_shard_is_computed_again_and_told(ran):
    folder, _ = ran
    shard = next((folder / "cache" / "attribution").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    before = tables(folder / "figures")
    arguments = ("run", "03", *SMALL, "--out", str(folder / "figures"), "--jobs", "1", "--fresh")
    result = harmonize(*arguments, cache=folder / "cache")
    assert result.returncode == 0
    assert f"03_feature_images: stored attribution {shard.stem[:12]} is corrupt: computing it again" in result.stderr
    assert tables(folder / "figures") == before


def test_a_notebook_that_takes_too_long_is_named_and_the_exit_code_says_so(tmp_path):
    result = harmonize("run", "03", *SMALL, "--out", str(tmp_path), "--timeout", "1", "--jobs", "1")
    assert result.returncode == 1 and "0 of 1 notebooks finished" in result.stdout
    assert "failed: 03_feature_images: " in result.stderr and "took longer than 1 s" in result.stderr
    assert "the ledger of claims was left as it is" in result.stdout and not (tmp_path / "claims.csv").exists()


def test_a_sweep_gives_one_table_and_one_figure_of_all_sets(ran, tmp_path):
    folder, _ = ran
    (tmp_path / "grid.yaml").write_text(
        "notebook: 3\ngrid: {seed: [0, 1]}\n"
        "base: {models: [resnet-obj, mobilenet-obj], methods: [saliency, integrated_gradients], n_images: 10}\n"
    )
    arguments = ("sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")
    result = harmonize(*arguments, cache=folder / "cache")
    assert result.returncode == 0 and "2 of 2 parameter sets finished" in result.stdout, result.stderr
    table = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert list(table.columns[:3]) == ["seed", "result", "what"] and set(table["seed"]) == {0, 1}
    for seed, part in table[table["result"] == "selectivity"].groupby("seed"):
        (one,) = (tmp_path / "out").glob(f"seed={seed}-*/03_feature_images/selectivity.csv")
        assert part["mean"].tolist() == pd.read_csv(one)["mean"].tolist()
    assert {"sweep.svg", "sweep.png", "sweep.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    again = harmonize(*arguments, cache=folder / "cache")
    assert again.returncode == 0 and "2 of 2 parameter sets finished, 2 of them before" in again.stdout


def here(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """The command in this process: its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["harmonize", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), *capsys.readouterr()


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
def test_mistakes_are_one_line_and_exit_code_2_and_leave_nothing(monkeypatch, capsys, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments or arguments[0] not in ("run", "sweep") else ["--out", str(tmp_path / "out")]
    code, told, error = here(monkeypatch, capsys, *arguments, *out)
    assert code == 2 and told == ""
    assert says in error and len(error.strip().splitlines()) == 1 and len(error.strip()) <= 200
    assert list(tmp_path.iterdir()) == []


def test_params_tells_name_type_default_range_and_meaning(monkeypatch, capsys):
    code, told, _ = here(monkeypatch, capsys, "params", "4")
    assert code == 0
    for name, info in NOTEBOOKS["04_cross_architecture_transfer"].model_fields.items():
        assert f"\n{name}: " in told and f"\n    {info.description}\n" in told
        assert f" = {json.dumps(info.default)}" in told
    assert "n_images: whole number = 100   (≥ 2, ≤ 100000)" in told and "(one of mean, blur, road)" in told
    assert "list of number" in told and "each > 0, ≤ 1)" in told


def test_every_command_explains_itself(monkeypatch, capsys):
    code, told, _ = here(monkeypatch, capsys, "--help")
    assert code == 0
    for name in ("run", "sweep", "params", "export", "train", "data", "doctor"):
        assert f"  {name} " in told
        code, help_, _ = here(monkeypatch, capsys, name, "--help")
        assert code == 0 and "Usage: harmonize" in help_


def test_export_writes_pages(monkeypatch, capsys, tmp_path, ran):
    kept = ran[0] / "figures" / "03_feature_images.ipynb"
    code, told, _ = here(monkeypatch, capsys, "export", str(kept), "--out", str(tmp_path / "html"))
    page = (tmp_path / "html" / "03_feature_images.html").read_text()
    assert code == 0 and "1 pages written" in told
    assert page.startswith("<!DOCTYPE html>") and "image/png;base64" in page and "reproduced" in page


def test_data_says_what_it_holds(monkeypatch, capsys):
    code, told, _ = here(monkeypatch, capsys, "data", "--n", "100")
    assert code == 0 and "10 classes" in told and "images per class: 10 to 10" in told
