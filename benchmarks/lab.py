"""What a lab does with a folder of its own images, by the commands of the program.

    python -m benchmarks.lab --images /usr/share/openclipart/png --log_folder logs/lab

These are the images of Debian's openclipart-png; any images in sub-folders will do. The folder is
not changed: the runs read links to its files. results/lab.json gets the seconds of each job, and
how often the nearest images by embeddings, pixels or colours lie in the same sub-folder. A job that
is there is not done again; a training that was stopped goes on.
"""

import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import ROOT, machine, parser, run_of, this_commit
from data import Images
from images.folders import find_images
from infra import files
from tools.probe import stored_embeddings
from tools.report.page import colour_histograms, pixels_of

N_ADDED, N_LABELLED, N_QUERIES = 100, 2000, 2000
LEFT_OUT = "shapes"  # no queries: most of them are 1,377 circles with more or fewer rays


def choose(images):
    """Return the paths of the images to begin with, those of them with a label, and those to add.

    images: the folder. The choice is random, and always the same.
    """
    paths = find_images(images)
    rng = random.Random(0)
    added = rng.sample(paths, min(N_ADDED, len(paths) // 10))
    first = sorted(set(paths) - set(added))
    labelled = rng.sample(first, min(N_LABELLED, len(first) // 4))
    return first, sorted(labelled), added


def begin(images, folder, first, labelled):
    """Make links to the first images and to a tenth of them, and a file with labels.

    A label is the name of the top folder.
    """
    file = folder / "labels.csv"
    if file.exists():
        return
    link_images(first, images, folder / "images")
    link_images(first[::10], images, folder / "tenth")
    names = [path.relative_to(images) for path in labelled]
    files.write_csv(file, ("path", "label"), [(name, name.parts[0]) for name in names])


def link_images(paths, root, folder):
    """Make links to paths below root at the same places below a folder."""
    for path in paths:
        place = folder / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(path)


def jobs(images, folder, added, settings):
    """Yield (name, arguments of main.py) of each job, in their order.

    Before the last two, images are added, and the commands are those that the program names.
    """
    data = ["--dataset", "folder", "--data_dir", folder / "images"]
    train = ["train", "--log_folder", folder, *data, *shlex.split(settings), "--exp_name"]
    yield "train", [*train, "unlabelled"]
    exp_dir = run_of(folder, "unlabelled").dir
    yield "report", ["report", "--exp_dir", exp_dir]
    yield "train with labels", [*train, "labels", "--labels", folder / "labels.csv"]
    tenth = ["--images", folder / "tenth", "--out", folder / "tenth.npz"]
    yield "embed", ["embed", "--exp_dir", exp_dir, *tenth]
    queries = find_images(folder / "tenth")[:3]
    sheet = ["--query", *queries, "--out", folder / "sheet.html"]
    yield "search", ["search", "--exp_dir", exp_dir, *sheet]
    yield "encode untrained", [*train, "untrained", "--n_epochs", 0]
    link_images(added, images, folder / "images")
    text, _ = timed(["resume", "--exp_dir", exp_dir], folder)
    embed, train_on = re.findall("`python main.py ([^`]+)`", text)
    yield "embed, grown", shlex.split(embed)
    yield "train on, grown", shlex.split(train_on)


def timed(words, folder):
    """Run main.py with these words in a folder. Return (what it prints, seconds).

    Exits if it fails.
    """
    start = time.monotonic()
    command = [sys.executable, ROOT / "main.py", *map(str, words)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    )
    if done.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout, time.monotonic() - start


def leaves(folder):
    """Return {representation: the shares of neighbours in the same sub-folder}, see leaf_shares.

    Of each file once: some images are links to others.
    """
    run, untrained = (run_of(folder, name).load("cpu") for name in ("unlabelled", "untrained"))
    content = stored_embeddings(run)["train"]
    real = [os.path.realpath(folder / "images" / path) for path in content["paths"]]
    rows = np.unique(real, return_index=True)[1]
    pixels = Images(run.hp, run.fingerprints)["train"].images[torch.from_numpy(rows)]
    paths = [Path(content["paths"][row]) for row in rows]
    representations = {
        "raw pixels": pixels_of(pixels),
        "colour histogram": colour_histograms(pixels),
        "untrained encoder": stored_embeddings(untrained)["train"]["embeddings"][rows],
        "trained encoder": content["embeddings"][rows],
    }
    return {name: leaf_shares(x, paths) for name, x in representations.items()}


def leaf_shares(x, paths, k=5):
    """Return how many of the k nearest rows lie in the folder of a query, in percent, as a dict.

    By the cosine of x (N, d), as given and less the mean. The queries are random paths.
    """
    _, folders = np.unique([str(path.parent) for path in paths], return_inverse=True)
    folders = torch.from_numpy(folders)
    asked = [row for row, path in enumerate(paths) if path.parts[0] != LEFT_OUT]
    queries = torch.tensor(random.Random(0).sample(asked, min(N_QUERIES, len(asked))))
    shares = {}
    for name, vectors in (("as given", x), ("centred", x - x.mean(0))):
        unit = F.normalize(vectors, dim=1)
        cosine = unit[queries] @ unit.T  # (n queries, N)
        cosine[torch.arange(len(queries)), queries] = -2
        nearest = cosine.topk(k).indices
        is_same = folders[nearest] == folders[queries, None]
        shares[name] = 100 * is_same.float().mean().item()
    return shares


def probe_figures(folder):
    """Return the accuracies of the run with labels, in percent."""
    result = run_of(folder, "labels").read_result()
    return {name: result[name] for name in ("top1", "balanced_top1", "largest_class", "n_test")}


def main(argv=None):
    made = parser(__doc__)
    made.add_argument("--images", type=Path, required=True)
    made.add_argument("--log_folder", type=Path, required=True)
    text = "of the runs (default: --preset laptop)"
    made.add_argument("--settings", default="--preset laptop", help=text)
    text = "say in the results that other programs slowed the jobs"
    made.add_argument("--disturbed", action="store_true", help=text)
    options = made.parse_args(argv)
    images, folder = options.images.resolve(), options.log_folder.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = options.out / "lab.json"
    results = {"jobs": {}, **files.read_json(path)}
    first, labelled, added = choose(images)
    begin(images, folder, first, labelled)
    results["n"] = {"images": len(first), "labelled": len(labelled), "added": len(added)}
    results |= {"disturbed": options.disturbed, "machine": machine()}
    for name, words in jobs(images, folder, added, options.settings):
        if name in results["jobs"]:
            continue
        _, seconds = timed(words, folder)
        results["jobs"][name] = {"seconds": seconds, "commit": this_commit()}
        print(f"{name}: {seconds:.1f} seconds", flush=True)
        if name == "encode untrained":  # the images must not have grown yet
            results |= {"leaves": leaves(folder), "probe": probe_figures(folder)}
            results["commit"] = this_commit()
        files.write_json(path, results)


if __name__ == "__main__":
    main()
