"""Which file may import which, as the sources say it."""

import ast

import pytest
from helpers import ROOT

PROGRAM = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("infra/*.py")), *sorted(ROOT.glob("tools/*.py"))]
TOP = {path.stem for path in ROOT.glob("*.py")}
METHOD = ("loss", "lars", "muon", "model", "patches", "backbones", "collapse")


def imports(path):
    """Return the names of this project's modules that a file imports, also within functions: "data", "infra.files", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            package = node.module in ("infra", "tools", "benchmarks")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if package else {node.module}
    return {name for name in names if name.split(".")[0] in TOP | {"infra", "tools", "benchmarks", "tests"}}


def of(name):
    return imports(ROOT / f"{name}.py")


def test_infra_imports_nothing_of_the_top_level():
    for path in ROOT.glob("infra/*.py"):
        assert all(name.startswith("infra.") for name in imports(path)), path
        assert "hp." not in path.read_text() and "Hparams" not in path.read_text(), path


@pytest.mark.parametrize("name", METHOD)
def test_the_method_imports_nothing_but_the_device_and_itself(name):
    assert of(name) <= {"infra.device", "infra.errors", *METHOD}


def test_no_stage_imports_tools_and_nothing_imports_main_or_the_benchmarks():
    for path in PROGRAM:
        names = imports(path)
        assert "main" not in names and not any(name.startswith(("benchmarks", "tests")) for name in names), path
        if path.parent != ROOT / "tools" and path.name != "main.py":
            assert not any(name.startswith("tools") for name in names), path


def test_imports_form_no_circle():
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports(path) for path in PROGRAM}
    while graph:
        leaves = [name for name, names in graph.items() if not names & set(graph)]
        assert leaves, sorted(graph)
        for name in leaves:
            del graph[name]


def test_ranks_and_paths_stand_in_one_place():
    for path in PROGRAM:
        text = path.read_text()
        if path.name not in ("distributed.py", "console.py"):
            assert "RANK" not in text, path
        if path.name != "experiment.py":
            for file in ("last.pt", "linear_accuracy.json", "metrics.jsonl", "environment.json", "probe.pt", "patches.png"):
                assert f'"{file}"' not in text, (path, file)


def test_sizes():
    """Files of at most 320 lines, functions of at most 50 with at most 8 parameters: an evening is enough to read them."""
    assert len((ROOT / "main.py").read_text().splitlines()) <= 260
    for path in PROGRAM:
        text = path.read_text()
        assert len(text.splitlines()) <= 320, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                n = len([argument for argument in arguments if argument.arg != "self"])
                assert node.end_lineno - node.lineno < 50, (path, node.name)
                assert n <= 8, (path, node.name)
