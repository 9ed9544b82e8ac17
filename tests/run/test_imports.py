"""Which file may import which, as the sources say it."""

import ast
from collections import defaultdict

import pytest
from helpers import ROOT

PACKAGES = ("images", "infra", "tools", "benchmarks", "tests")
FOLDERS = (ROOT, *(ROOT / name for name in ("images", "infra", "tools", "tools/report")))
PROGRAM = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))
TOP = {path.stem for path in ROOT.glob("*.py")}
METHOD = ("loss", "lars", "model", "patches")


def imports(path):
    """Return the names of this project's modules that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            if node.module in PACKAGES:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return {name for name in names if name.split(".")[0] in TOP | set(PACKAGES)}


def module_of(path):
    """Return the name by which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_infra_imports_nothing_of_the_top_level_and_knows_no_hyperparameter():
    for path in ROOT.glob("infra/*.py"):
        assert all(name.startswith("infra.") for name in imports(path)), path
        assert "hp." not in path.read_text() and "Hparams" not in path.read_text(), path


@pytest.mark.parametrize("name", METHOD)
def test_the_method_imports_nothing_but_the_device_and_itself(name):
    assert imports(ROOT / f"{name}.py") <= {"infra.device", "infra.errors", *METHOD}


def test_no_stage_imports_tools_and_nothing_imports_main_or_the_benchmarks():
    for path in PROGRAM:
        names = imports(path)
        assert "main" not in names, path
        assert not any(name.startswith(("benchmarks", "tests")) for name in names), path
        if "tools" not in path.parts and path.name not in ("main.py", "cli.py"):
            assert not any(name.startswith("tools") for name in names), path


def test_imports_form_no_circle():
    graph = {module_of(path): imports(path) for path in PROGRAM}
    while graph:
        leaves = [name for name, names in graph.items() if not names & set(graph)]
        assert leaves, sorted(graph)
        for name in leaves:
            del graph[name]


def test_ranks_and_paths_stand_in_one_place():
    names = (
        "last.pt",
        "linear_accuracy.json",
        "metrics.jsonl",
        "environment.json",
        "probe.pt",
        "images.csv",
    )
    for path in PROGRAM:
        text = path.read_text()
        if path.name not in ("distributed.py", "console.py"):
            assert "RANK" not in text, path
        if path.name != "experiment.py":
            for file in (*names, "patches.png"):
                assert f'"{file}"' not in text, (path, file)


def test_no_top_level_name_stands_in_two_modules():
    """But for `main` of a command, and two files that are programs of their own."""
    alone = {ROOT / "benchmarks" / "baseline.py", ROOT / "tools" / "load.py"}
    modules = defaultdict(list)
    for path in {*PROGRAM, *ROOT.glob("benchmarks/*.py")} - alone:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                modules[node.name].append(module_of(path))
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    modules[getattr(target, "id", None)].append(module_of(path))
    del modules[None], modules["main"]
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}
