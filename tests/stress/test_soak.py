"""Two thousand steps in one process, watched from another."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT


def memory_and_files(pid):
    """Resident bytes and the number of open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_open_files_stay_flat_and_each_line_of_metrics_is_whole(tmp_path):
    command = (
        "train --dataset textures --n_images 4000 --input_size 8 --arch resnet10-tiny --h_dim 8 "
        "--z_dim 4 --n_patches 2 --bs 2 --n_epochs 1 --n_eval_epochs 1 --print_freq 10 "
        "--checkpoint_every 1 --device cpu --precision fp32 --exp_name soak --log_folder"
    ).split()
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *command, tmp_path], **pipes)
    path = tmp_path / "soak__numpatch2_bs2_lr0.3" / "metrics.jsonl"
    seen, reads = {}, 0
    while process.poll() is None and 2000 not in seen:
        time.sleep(0.02)
        if path.exists():
            text = path.read_text()
            assert text.endswith("\n") or not text
            steps = [json.loads(line)["step"] for line in text.splitlines()]
            reads += 1
            if steps:
                seen[steps[-1]] = memory_and_files(process.pid)
    process.terminate()
    assert process.wait() in (0, 143), process.stderr.read()
    assert steps == list(range(10, 2001, 10))
    assert reads > 100
    early, late = (
        [seen[step] for step in seen if first <= step <= first + 500] for first in (500, 1500)
    )
    assert seen[2000][0] <= 1.03 * early[0][0]
    # The minimum, since one more is open while a checkpoint is written.
    assert min(files for _, files in late) <= min(files for _, files in early)
