import re

import readme
from conftest import ROOT, run

TEXT = (ROOT / "README.md").read_text()


def test_options_and_figures_are_those_of_the_declaration_and_the_results():
    assert readme.render(TEXT) == TEXT


def test_commands_use_options_that_exist():
    options = set(re.findall(r"--[\w-]+", run("train", "--help").out))
    for command in ("resume", "cleanup"):
        options |= set(re.findall(r"--[\w-]+", run(command, "--help").out))
    used = re.findall(r"^python main\.py .*$", TEXT, re.M)
    assert len(used) >= 5
    for line in used:
        assert set(re.findall(r"--[\w-]+", line)) <= options, line
    for target in re.findall(r"^make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
