"""The real command, killed at random moments and repeated until it is done, changes no bit.

python -m pytest tests/stress/test_chaos.py --runs 200
"""

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from helpers import ROOT, RUN, contents, unexpected

# The program with a slow disk: a file is written in ten parts, and flushed for a while, so that
# some kills leave half a file.
SLOW = """
import io, os, sys, time, torch, main
save, fsync = torch.save, os.fsync
def slow_save(content, file):
    buffer = io.BytesIO()
    save(content, buffer)
    whole = buffer.getvalue()
    for i in range(10):
        file.write(whole[i * len(whole) // 10 : (i + 1) * len(whole) // 10])
        file.flush()
        time.sleep(0.003)
def slow_fsync(number):
    time.sleep(0.01)
    fsync(number)
torch.save, os.fsync = slow_save, slow_fsync
sys.exit(main.main(sys.argv[1:]))
"""
# A line of the program's output: a kill comes up to half a second after one of them.
MOMENTS = (
    "* Device",
    "* Loading",
    "===> Training",
    "Epoch: 0",
    "Epoch: 1",
    "* Encoder",
    "===> Encoding 'test'",
    "===> Fitting",
)


def killed_and_resumed(tiny, finished, folder, seed, kills):
    """Return the moments of `kills` kills, and how many of them left half a file.

    Each run is resumed until it is done and then compared; then the next one starts.
    """
    choose = random.Random(seed)
    moments = []
    halves = 0
    n_done = 0
    while True:
        logs = folder / f"{seed}-{n_done}"
        command = [sys.executable, "-c", SLOW, *tiny, "--log_folder", str(logs)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, **pipes)
        moment, delay = choose.choice(MOMENTS), choose.uniform(0, 0.5)
        for line in process.stdout:
            if line.startswith(moment) and len(moments) < kills:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
        error = process.stderr.read()
        if process.wait() == -signal.SIGKILL:
            moments.append(moment)
            halves += any(logs.rglob("*.tmp"))
        else:
            assert (process.returncode, unexpected(error)) == (0, "")
            assert contents(logs / RUN) == contents(finished)
            n_done += 1
            if len(moments) == kills:
                return moments, halves


def test_kills_at_random_moments_change_no_bit(tiny, finished, tmp_path, request):
    kills = request.config.getoption("--runs") // 2
    with ThreadPoolExecutor(2) as pool:
        chains = list(
            pool.map(lambda seed: killed_and_resumed(tiny, finished, tmp_path, seed, kills), (1, 2))
        )
    moments = [moment for moments, _ in chains for moment in moments]
    counts = {moment: moments.count(moment) for moment in MOMENTS}
    print(counts, "half files:", sum(halves for _, halves in chains))
    assert len(moments) == 2 * kills
