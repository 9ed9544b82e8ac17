"""Run folders of earlier versions: format-N.tar.xz has one of format N, and its images.

Each is read, or refused in one line. Its weights were rounded, so that the file is small.
"""

import tarfile
from pathlib import Path

import pytest
from helpers import changed_files, fingerprints, refused, run

from infra import files

ARCHIVES = sorted(Path(__file__).parent.glob("format-*.tar.xz"))
COMMANDS = {
    "resume": "resume --exp_dir run",
    "report": "report --exp_dir run",
    "compare": "compare .",
    "export": "export --exp_dir run --format torchvision",
    "embed": "embed --exp_dir run --images images --out out.npz --device cpu",
}


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_folder_of_each_format_is_read_or_refused_in_one_line(
    tmp_path, monkeypatch, archive, name
):
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = fingerprints(tmp_path / "run")
    result = run(*COMMANDS[name].split())
    if archive.name != f"format-{files.FORMAT}.tar.xz":
        words = "an earlier version of this program"
        if name == "compare":  # a line of its table
            assert (result.code, words in " ".join(result.out.split())) == (0, True)
        else:
            assert refused(result, 2, words)
        return
    assert (result.code, result.err) == (0, "")
    shown = {"resume": "linear probe     top-1 50.00%", "compare": "50.00  66.67"}.get(name, "")
    assert shown in result.out
    if name == "resume":
        assert not changed_files(tmp_path / "run", before)
        assert "Loaded run/probe.pt" in result.out
    if name == "report":
        assert "50.00%" in Path("run/report.html").read_text()


def test_there_is_a_run_folder_of_this_format():
    assert f"format-{files.FORMAT}.tar.xz" in [path.name for path in ARCHIVES]
