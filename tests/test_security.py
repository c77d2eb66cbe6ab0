"""Nothing a user names or downloads runs as code or reaches outside its folder; nothing committed names a machine."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import torch
from small import FEW, NAME, notebook, process

from harmonize_lib import HarmonizeError, cli, load_model, parameters, paths, verify

SOURCES = sorted(paths.ROOT.joinpath("harmonize_lib").glob("*.py"))
COMMITTED = [
    *sorted(paths.NOTEBOOKS.rglob("*.ipynb")),
    *sorted(path for path in (paths.ROOT / "figures").rglob("*") if path.suffix in (".json", ".csv", ".svg")),
    *sorted(paths.WEIGHTS.glob("*.json")),
]
FORBIDDEN = {
    "eval": "runs a text as code",
    "exec": "runs a text as code",
    "compile": "makes code of a text",
    "__import__": "hides an import",
    "pickle.load": "runs what a file says",
    "pickle.loads": "runs what a file says",
    "yaml.load": "makes any object: yaml.safe_load",
    "yaml.unsafe_load": "makes any object: yaml.safe_load",
    "yaml.full_load": "makes objects: yaml.safe_load",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "shutil.unpack_archive": "extracts without looking",
    "torch.hub.load": "runs downloaded code",
}
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "zipfile", "tarfile"}


def name_of(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def sins(source: str) -> list[str]:
    """What no module of the library may do, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, keywords = name_of(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in FORBIDDEN:
            found.append(f"{node.lineno}: {name} {FORBIDDEN[name]}")
        if name == "torch.load" and getattr(keywords.get("weights_only"), "value", None) is not True:
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if name.endswith((".extractall", ".extract")):
            found.append(f"{node.lineno}: {name} extracts without looking")
        if "allow_pickle" in keywords or getattr(keywords.get("shell"), "value", False):
            found.append(f"{node.lineno}: {name} allows pickle or a shell")
        if name in ("np.load", "numpy.load"):
            found.append(f"{node.lineno}: {name}: the store is safetensors")
    return found


RESTRICTED = {"bam_data"}  # reads BAM's published masks by an unpickler of arrays alone; test_bam_data.py shows that


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stem not in RESTRICTED], ids=lambda path: path.stem)
def test_the_library_runs_no_text_unpickles_nothing_and_extracts_nothing(path):
    assert sins(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(x)",
        "import pickle",
        "from zipfile import ZipFile",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "yaml.load(t, Loader=yaml.SafeLoader)",
        "archive.extractall(p)",
        "subprocess.run(c, shell=True)",
        "np.load(p, allow_pickle=True)",
        "os.system(c)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert sins(source)


def test_the_linter_looks_for_the_same():
    lint = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in lint["select"] and not any(rule.startswith("S") and rule[1:].isdigit() for rule in lint["ignore"])
    library = [key for key in lint.get("per-file-ignores", {}) if "harmonize_lib" in key]
    assert library == []
    done = process("ruff", "check", "--select", "S", "--no-cache", "harmonize_lib", cwd=paths.ROOT)
    assert done.returncode == 0, done.stdout


def test_silenced_security_rules_are_calls_of_fixed_commands():
    """A `noqa: S` is there only for subprocesses that take a list and no shell."""
    for path in SOURCES:
        for line in path.read_text().splitlines():
            assert set(re.findall(r"noqa:.*?\b(S\d+)", line)) <= {"S603", "S607"}, f"{path.name}: {line}"


def test_a_pickle_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "pwned"), "w")

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(HarmonizeError, match=r"evil\.pth: not a readable weights file"):
        load_model("resnet-obj", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


INJECTIONS = [
    'open("pwned", "w").close(); z',
    "n_images = 3; open('pwned', 'w'); z",
    "__import__('os').system('touch pwned') or z",
    "n_images\nopen('pwned','w').close()\nz",
    "class",
    "",
    "__builtins__",
]


@pytest.mark.parametrize("name", INJECTIONS)
def test_no_code_through_a_parameter_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harmonize", "run", "03", "-p", f"{name}=1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and list(tmp_path.iterdir()) == []
    if not name.startswith("__builtins"):  # what a notebook's globals hold anyway
        with pytest.raises(HarmonizeError, match="unknown parameter"):
            parameters.check(NAME, {name: 1})


VALUES = [
    'x"\nopen("pwned", "w").close()\ny="',
    "'; open('pwned', 'w').close(); '",
    '\\"; open("pwned", "w"); "',
    "{0}",
]


def test_no_code_through_a_parameter_value(tmp_path):
    """Papermill's own quoting, with values that try to end the string they are put into."""
    cells = "\n".join(f'value_{i}: str = ""' for i in range(len(VALUES)))
    book = notebook(parameters=cells)
    book.cells = book.cells[:2]
    book.cells.append(
        nbformat.v4.new_code_cell(
            "import json\nprint(json.dumps([" + ", ".join(f"value_{i}" for i in range(len(VALUES))) + "]))", id="show"
        )
    )
    nbformat.write(book, tmp_path / "in.ipynb")
    (tmp_path / "values.yaml").write_text(json.dumps({f"value_{i}": value for i, value in enumerate(VALUES)}))
    done = process(
        *("papermill", "in.ipynb", "out.ipynb", "-f", "values.yaml", "--no-progress-bar", "--log-level", "ERROR"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    last = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1]
    assert json.loads(last.outputs[0].text) == VALUES
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", VALUES)
def test_such_values_do_not_pass_where_names_are_expected(value):
    for name in ("dataset", "fill"):
        with pytest.raises(HarmonizeError):
            parameters.check(NAME, FEW | {name: value})
    for name in ("models", "methods"):
        with pytest.raises(HarmonizeError):
            parameters.check(NAME, FEW | {name: [value, value]})


@pytest.mark.parametrize(
    "source",
    ["n_images = open('pwned', 'w').close()", "n_images: int = __import__('os').getpid()", "open('pwned', 'w')"],
)
def test_a_notebook_that_is_verified_is_read_not_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HarmonizeError, match="may only assign literals"):
        verify.assignments(source, NAME)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name", ["../03_feature_imagesx", "/etc/passwd", "..", "../../etc", "03/../../x", "{0.__class__}"]
)
def test_no_path_through_a_notebook_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harmonize", "run", name])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["../resnet-obj", "resnet-obj/../x", "resnet-../obj", "/etc/resnet-obj", "resnet-obj\n"]
)
def test_no_path_through_a_model_name(name, tmp_path, monkeypatch, capsys):
    with pytest.raises(HarmonizeError):
        load_model(name)
    monkeypatch.setattr(sys, "argv", ["harmonize", "train", name, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and not (tmp_path / "out").exists()


def test_provenance_holds_no_place_of_this_machine(tmp_path):
    (tmp_path / "photos").mkdir()
    settings = parameters.check(NAME, FEW | {"dataset": f"imagefolder:{tmp_path}/photos", "output": str(tmp_path)})
    settings = settings.model_copy(update={"models": ["vgg-obj", f"timm:resnet18?weights={tmp_path}/w.pth"]})
    told = json.dumps(parameters.recorded(settings))
    assert str(tmp_path) not in told and "imagefolder:photos" in told and "timm:resnet18" in told


HOME = re.compile(r"(/home/\w|/root/|/Users/\w|[A-Z]:\\\\?Users|/tmp/\w|/work/\w|/var/folders/)")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(paths.ROOT)))
def test_nothing_committed_holds_a_path_of_a_machine(path: Path):
    text = re.sub(r"data:image/\w+;base64,[^\"]+|\"image/png\": \"[^\"]+\"", "", path.read_text())
    assert HOME.findall(text) == []
