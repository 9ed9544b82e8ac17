"""Remove the older epoch checkpoints of every experiment in a folder, and stored embeddings."""

from pathlib import Path

from experiment import Run, load_checkpoint
from images.cache import cache_path
from infra import files
from infra.console import log
from infra.errors import RunError, UsageError


def add_cleanup(commands):
    """Add the command cleanup."""
    parser = commands.add_parser(
        "cleanup",
        help="remove old checkpoints",
        description="Say what takes the room, and remove the older epoch checkpoints of every "
        "experiment in a folder; the newest always stays.",
    )
    parser.add_argument(
        "--log_folder",
        default=Path("logs/EMP-SSL-Training"),
        type=files.user_path,
        help="folder of run folders (default: logs/EMP-SSL-Training)",
    )
    parser.add_argument(
        "--keep",
        default=2,
        type=int,
        metavar="N",
        help="epoch checkpoints to keep of each (default: 2)",
    )
    parser.add_argument(
        "--artifacts",
        action="store_true",
        help="remove the stored embeddings too; resume encodes again",
    )
    parser.add_argument("-y", dest="yes", action="store_true", help="do not ask")
    parser.set_defaults(command=cleanup_command)


def cleanup_command(args):
    """Print what takes the room; list what can be removed and, after a question, remove it."""
    if args.keep < 1:
        raise UsageError(f"keep must be at least 1, not {args.keep}")
    if not args.log_folder.is_dir():
        raise UsageError(f"log_folder {args.log_folder} is not a folder")
    runs = [Run(path) for path in sorted(args.log_folder.iterdir())]
    runs = [run for run in runs if run.hparams_yaml.is_file()]
    old = [path for run in runs for path in old_checkpoints(run, args.keep)]
    if args.artifacts:
        unused = [run for run in runs if not run.in_use()]
        artifacts = [path for run in unused for path in run.artifacts.values()]
        old += [path for path in artifacts if path.exists()]
    size = sum(path.stat().st_size for path in old)
    log_room(runs)
    for path in old:
        log.info(path)
    log.info(f"{len(old)} files of {len(runs)} experiments can go, {size / 1e6:,.1f} MB")
    if old and (args.yes or confirmed("Remove them? [y/N] ")):
        for path in old:
            path.unlink(missing_ok=True)
        log.info(f"Freed {size / 1e6:,.1f} MB")
    else:
        log.info("Nothing removed")


def log_room(runs):
    """Print how much room checkpoints, embeddings and the cache of decoded images take."""
    cache = cache_path("", "").parent
    for name, folders in (
        ("checkpoints", [run.checkpoints for run in runs]),
        ("embeddings (--artifacts)", [run.artifacts["train"].parent for run in runs]),
        (f"decoded images of all runs in {cache}", [cache]),
    ):
        stats = [path.stat() for folder in folders for path in folder.glob("*")]
        sizes = {stat.st_ino: stat.st_size for stat in stats}  # some files have two names
        log.info(f"{sum(sizes.values()) / 1e6:10,.1f} MB {name}")


def old_checkpoints(run, keep):
    """Return the epoch checkpoints that are older than the newest `keep` whole ones, in order.

    Damaged ones do not count, and stay.
    """
    paths = run.epoch_checkpoints()
    n_whole = 0
    while paths and n_whole < keep:
        path = paths.pop()
        try:
            load_checkpoint(path)
        except (RunError, UsageError) as error:
            log.warning(f"{error}: it stays, and so does an older one")
        else:
            n_whole += 1
    return paths


def confirmed(question):
    """Whether a question is answered with yes; the end of the input counts as no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
