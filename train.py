"""Stage 1: train the encoder. `train` is the loop, `train_step` one step of the method."""

import math
import shlex
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from evaluate import quick_evaluation
from experiment import n_steps_in
from images.cache import batches, index_for, on_device
from infra import distributed
from infra.console import log, log_stage, progress_bar, time_left
from infra.device import generator, peak_memory
from infra.errors import RunError
from infra.signals import Interrupted, first_signal, hold_signals
from loss import emp_ssl_loss, loss_of_stages
from optimizers import build_optimizer, learning_rate, load_momenta, set_learning_rate
from patches import batch_params, render

STEP_METRICS = ("invariance loss", "uniformity loss", "gradient norm")  # of each step
FEW_STEPS = 50
SHOW_EVERY = 5.0  # seconds; on slow machines, losses are shown between two records
STOP_NOTICE = "* Stopping at the end of this step; a second signal leaves at once"
REMEDY = (
    "the last checkpoint is kept: lower lr (or set precision: fp32) in hparams.yaml, then resume"
)


def train(run, encoder, images):
    """Train the encoder in place, from run.checkpoint (None: from the start) to hp.n_epochs.

    Returns at once if that is done. Raises RunError if a loss, gradient or weight is not finite,
    and Interrupted after a signal, when the checkpoint is written. Each step depends only on the
    state, the seed, the epoch and the step, so a run that was stopped and resumed ends with the
    same bits as one that was not.
    """
    if run.is_trained():
        return
    log_stage("Training SSL encoder")
    hp = run.hp
    pixels = on_device(images["train"].images, run.device)  # uint8 (N, 3, H, W)
    optimizer = build_optimizer(hp, encoder, run.bf16)
    state = restore(run, optimizer, n_steps=len(pixels) // hp.bs)
    n_total = n_steps_in(hp.n_epochs, state.n_steps)
    encoder.train()
    network = distributed.data_parallel(encoder, run.device)  # it shares the encoder's weights
    step = build_step(hp, torch.compile(network) if hp.compile else network, optimizer, run.bf16)

    acknowledge = partial(log.info, STOP_NOTICE)
    with hold_signals(acknowledge) as signals, closing(Meter(run, state, n_total)) as meter:
        save = partial(save_checkpoint, run, images.fingerprints, encoder, optimizer, state, meter)
        if not run.checkpoint:
            warn_of_few_steps(len(pixels), n_total)
            save()  # fail now if the folder is not writable
        for batch, rng in batches_from(state, run, pixels):
            lr = learning_rate(hp, state.step / n_total)
            set_learning_rate(optimizer, lr)
            state.add(step(batch, rng))
            meter.count(state)
            if is_record_due(hp, state, n_total) or meter.is_show_due():
                report(run, state, meter, lr)
            if hp.eval_freq and state.step % hp.eval_freq == 0:
                seconds = quick_evaluation(run, encoder, images, state.index(state.epoch))
                meter.timed_at += seconds  # not counted in the rate
            ends_an_epoch = state.ends_an_epoch(n_total)
            if ends_an_epoch:
                meter.close()
                log_epoch(hp, state)
            stop, due = distributed.all_reduce_max(first_signal(signals), meter.is_save_due(hp))
            if stop or due or ends_an_epoch:
                save()
            raise_if(stop, run, state)
    (stop,) = distributed.all_reduce_max(first_signal(signals))  # one that came after the last step
    raise_if(stop, run, state)
    distributed.broadcast_buffers(encoder)


def batches_from(state, run, pixels):
    """Yield (images, generator of their patches) of each step, from state.step to the last one.

    pixels: uint8 (N, 3, H, W) or an ImageFile. With several processes the images, uint8
    (B, 3, H, W) on the run's device, are this one's shard of the batch.
    """
    hp = run.hp
    n_total = n_steps_in(hp.n_epochs, state.n_steps)
    while state.step < n_total:
        epoch, start = state.position
        end = min(state.n_steps, n_total - epoch * state.n_steps)
        order = torch.randperm(len(pixels), generator=generator(hp.seed, "order", epoch))
        order = index_for(pixels, order, run.device)
        rows = [distributed.shard(order[i * hp.bs : (i + 1) * hp.bs]) for i in range(start, end)]
        for i, batch in enumerate(batches(pixels, rows, run.device), start):
            yield batch, generator(hp.seed, "patches", epoch, i)


def build_step(hp, network, optimizer, bf16):
    """Return train_step with the settings of a run: a function of (images, generator)."""
    options = {"tcr": {"eps": hp.tcr_eps}, "contrastive": {"temperature": hp.temperature}}
    criterion = partial(
        emp_ssl_loss,
        uniformity_loss=hp.uniformity_loss,
        invariance_weight=hp.invariance_loss_weight,
        uniformity_weight=hp.uniformity_loss_weight,
        bags=hp.bags,
        **options.get(hp.uniformity_loss, {}),
    )
    return partial(
        train_step,
        network,
        optimizer,
        views=hp.train_views,
        criterion=partial(loss_of_stages, criterion=criterion, stage_weight=hp.stage_loss_weight),
        max_patches=hp.max_patches,
        bf16=bf16,
    )


def train_step(
    network, optimizer, images, generator, views, criterion, max_patches=None, bf16=False
):
    """Train on one batch and return STEP_METRICS (3,) on the device; the host never waits for it.

    network: a model.Encoder, possibly wrapped. images: uint8 (B, 3, H, W) on its device. With
    several processes they are this one's shard, and the losses are those of the whole batch.
    generator: a CPU torch.Generator. views: patches.Views. criterion: z (P, B, K, d) of K stages ->
    (total, invariance, uniformity). max_patches: patches in the network at once, None for all.
    bf16: run the network under bfloat16 autocast.
    """
    first, batch = distributed.shard_offset(len(images))
    params = batch_params(images.shape, views.n, generator, first, batch, views.augment)
    sample = partial(render, images, size=views.size)  # rows of params -> (n, 3, S, S)
    z, backward = project(network, sample, params, max_patches, bf16)
    z = z.unflatten(0, (views.n, -1))  # (P B, K, d) -> (P, B, K, d)
    total, invariance, uniformity = criterion(distributed.all_gather(z))
    optimizer.zero_grad()
    backward(total)
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(grads)
    optimizer.step()
    return torch.stack([invariance, uniformity, grad_norm]).detach()


def project(network, sample, params, max_patches, bf16):
    """Return (z, backward): z (n, K, d) of n patches, and what backpropagates a loss of z.

    sample(params) renders the patches. With more than max_patches patches, z is computed chunk by
    chunk without a graph. backward computes the gradient of z and then samples the chunks and
    passes them through the network again, so that the patches and activations of only one chunk
    are alive. The running statistics of batch norm see each chunk twice.
    Source: arXiv 2101.06983, section 3.2 (gradient cache).
    """
    n = len(params["image"])
    n_chunks = math.ceil(n / (max_patches or n))

    def forward(chunk):
        x = sample(chunk)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return network(x, all_heads=True)[1]  # (len(x), K, d)

    if n_chunks == 1:
        return forward(params), torch.Tensor.backward
    parts = {name: values.tensor_split(n_chunks) for name, values in params.items()}
    chunks = [{name: values[i] for name, values in parts.items()} for i in range(n_chunks)]
    with torch.no_grad():
        z = torch.cat([forward(chunk) for chunk in chunks])  # (n, K, d)
    z.requires_grad_()

    def backward(total):
        total.backward()
        for i, (chunk, grad) in enumerate(zip(chunks, z.grad.tensor_split(n_chunks), strict=True)):
            with distributed.no_sync(network, enabled=i < n_chunks - 1):
                forward(chunk).backward(grad)

    return z, backward


@dataclass
class TrainState:
    """What a checkpoint keeps of the training loop, besides weights and momenta."""

    n_steps: int  # in an epoch
    step: int = 0  # steps done, over all epochs
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(3))  # of n_totals steps
    n_totals: int = 0  # steps of this epoch whose STEP_METRICS are in totals
    recent: list = field(default_factory=list)  # STEP_METRICS (3,) of the later steps, on device
    seconds: float = 0.0  # of training
    peak_memory: int = 0  # bytes

    def state_dict(self):
        """Return the fields as tensors and plain values, on the CPU."""
        recent = torch.stack(self.recent).cpu() if self.recent else torch.zeros(0, 3)
        return {**vars(self), "recent": recent}

    def add(self, metrics):
        """Count a step and keep its STEP_METRICS (3,)."""
        self.recent.append(metrics)
        self.step += 1

    def move_to_totals(self, rows):
        """Add the recent STEP_METRICS, here as rows (steps, 3) on the CPU, to the totals."""
        self.totals = self.totals + rows.sum(0)
        self.n_totals += len(rows)
        self.recent = []

    def clear_totals(self):
        """Forget the losses of this epoch."""
        self.totals = torch.zeros(3)
        self.n_totals = 0
        self.recent = []

    @property
    def position(self):
        """(epoch, steps done in it). After the last step of an epoch, it is that of the next."""
        return divmod(self.step, max(1, self.n_steps))

    @property
    def epoch(self):
        """The epoch of the last step that was done."""
        return (self.step - 1) // self.n_steps

    def index(self, epoch):
        """Return the keys of a line of metrics.jsonl: the epoch, steps done in it and in all."""
        return {"epoch": epoch, "step": self.step - epoch * self.n_steps, "global_step": self.step}

    def ends_an_epoch(self, n_total):
        """Whether the last step ended an epoch, or training after n_total steps."""
        return self.step % self.n_steps == 0 or self.step == n_total


class Meter:
    """The clocks of the training loop in this process, and its lines of progress.

    n_total: steps of the whole training.
    """

    def __init__(self, run, state, n_total):
        self.device = run.device
        self.patches_per_step = run.hp.n_patches * run.hp.bs
        self.n_total = n_total
        self.seconds_before = state.seconds  # of training, in earlier launches
        self.started_at = time.monotonic()
        self.timed_at = self.saved_at = self.shown_at = self.started_at
        self.n_timed = 0  # steps since timed_at
        self.epoch = None
        self.bar = None  # of self.epoch
        self.end_was_shown = False

    def count(self, state):
        """Count a step."""
        self.n_timed += 1
        if state.epoch != self.epoch:
            self.close()
            self.epoch = state.epoch
            start = state.epoch * state.n_steps
            last = min(state.n_steps, self.n_total - start)
            initial = state.step - 1 - start
            self.bar = progress_bar(None, f"epoch {self.epoch}", total=last, initial=initial)
        self.bar.update()

    def seconds(self):
        """Return the seconds of training, earlier launches included."""
        return self.seconds_before + time.monotonic() - self.started_at

    def rate(self):
        """Return the steps per second since the last record."""
        return self.n_timed / (time.monotonic() - self.timed_at)

    def is_show_due(self):
        """Whether nothing was shown for SHOW_EVERY seconds."""
        return time.monotonic() - self.shown_at > SHOW_EVERY

    def is_save_due(self, hp):
        """Whether the last checkpoint is checkpoint_every seconds old."""
        return time.monotonic() - self.saved_at > hp.checkpoint_every

    def restart(self):
        """Restart the clock of the rate."""
        self.n_timed = 0
        self.timed_at = time.monotonic()

    def show(self, state, means, lr):
        """Show the means of STEP_METRICS (3,), beside the bar or as a line."""
        invariance, uniformity, _ = means.tolist()
        rate = self.rate()
        text = (
            f"sim {invariance:.4f} uniformity {uniformity:.3f} lr {lr:.4f} "
            f"{rate * self.patches_per_step:,.0f} patches/s"
        )
        if self.bar.disable:
            step = state.index(state.epoch)["step"]
            left = time_left(self.bar.total - step, rate)
            log.info(f"epoch {state.epoch} step {step}/{self.bar.total} | {text}, {left} left")
        else:
            self.bar.set_postfix_str(text)
        self.shown_at = time.monotonic()

    def show_end(self, state):
        """Print when training will end, at the first call only."""
        if not self.end_was_shown:
            self.end_was_shown = True
            log_end((self.n_total - state.step) / self.rate(), self.device)

    def close(self):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def report(run, state, meter, lr):
    """Show the means of STEP_METRICS since the last record, and record them if that is due."""
    rows = torch.stack(state.recent).cpu()  # (steps, 3); the host waits here, not in each step
    means = rows.mean(0)
    rate = meter.rate()
    if not is_record_due(run.hp, state, meter.n_total):
        meter.show(state, means, lr)
        meter.show_end(state)
        return
    check_finite(state)  # here and not above: all processes must raise at the same step
    meter.show(state, means, lr)
    invariance, uniformity, grad_norm = means.tolist()
    run.journal.add(
        **state.index(state.epoch),
        loss_sim=invariance,
        loss_uniformity=uniformity,
        grad_norm=grad_norm,
        lr=lr,
        patches_per_second=round(rate * meter.patches_per_step, 1),
    )
    state.move_to_totals(rows)
    meter.restart()


def is_record_due(hp, state, n_total):
    """Whether to record losses after this step: every print_freq steps and at the epoch's end."""
    step = state.index(state.epoch)["step"]
    return step % hp.print_freq == 0 or state.ends_an_epoch(n_total)


def check_finite(state):
    """Raise RunError that names the step and the value if recent STEP_METRICS are not finite."""
    rows = torch.stack(state.recent).tolist() if state.recent else []
    for i, values in enumerate(rows):
        for name, value in zip(STEP_METRICS, values, strict=True):
            if not math.isfinite(value):
                epoch, step = divmod(state.step - len(rows) + i, state.n_steps)
                raise RunError(f"epoch {epoch} step {step}: the {name} is {value}; {REMEDY}")


def log_epoch(hp, state):
    """Print the mean losses of the epoch. If it is a whole one, the next begins with zeros."""
    invariance, uniformity, _ = (state.totals / state.n_totals).tolist()
    log.info(
        f"Epoch: {state.epoch} | Loss sim: {invariance:.5f} | "
        f"Loss {hp.uniformity_loss.upper()}: {uniformity:.5f}"
    )
    if state.step % state.n_steps == 0:
        state.clear_totals()


def log_end(seconds, device):
    """Print how long training will take, and on a CPU, if it is over an hour, what is quicker."""
    log.info(f"* Training will take about {time_left(seconds, 1)} from here on")
    if device.type == "cpu" and seconds > 3600:
        log.info("* Quicker on a CPU: --preset laptop, or fewer images by --n_images")


def warn_of_few_steps(n_images, n_total):
    """Warn if training has fewer than FEW_STEPS steps."""
    if 0 < n_total < FEW_STEPS:
        log.warning(
            f"{n_images} images, {n_total} steps of training in all: this teaches little; raise "
            f"n_epochs or lower bs (more patches add no steps)"
        )


def restore(run, optimizer, n_steps):
    """Return the TrainState of the run's checkpoint, or a new one, and load the momenta.

    metrics.jsonl is cut to where it was at the checkpoint.
    """
    checkpoint = run.checkpoint
    if checkpoint is None:
        run.journal.begin("training", metrics_bytes=0)
        return TrainState(n_steps)
    load_momenta(optimizer, checkpoint["optimizer"])
    state = TrainState(**checkpoint["state"])
    state.recent = list(state.recent.to(run.device))
    if "bs" in run.changed:
        old_bs, _ = run.changed["bs"]
        change_batch_size(state, run.hp, old_bs, n_steps)
    epoch, step = state.position
    log.info(f"* Going on at epoch {epoch} step {step}")
    run.journal.begin("training", checkpoint["metrics_bytes"])
    for name, (old, new) in run.changed.items():
        run.journal.add(event="changed", **state.index(epoch), name=name, old=old, new=new)
    return state


def change_batch_size(state, hp, old_bs, n_steps):
    """Keep the position in images; the losses so far are of another batch size."""
    epoch, step = state.position
    left = n_steps_in(hp.n_epochs, n_steps) - epoch * n_steps
    step = min(step * old_bs // hp.bs, n_steps - 1, left - 1)
    state.n_steps = n_steps
    state.step = epoch * n_steps + step
    state.clear_totals()


def save_checkpoint(run, fingerprints, encoder, optimizer, state, meter):
    """Write a checkpoint. Raises RunError, and writes nothing, if anything is not finite."""
    check_finite(state)
    if not all(value.isfinite().all() for value in encoder.state_dict().values()):
        epoch, step = state.position
        raise RunError(f"epoch {epoch} step {step}: weights are not finite; {REMEDY}")
    state.seconds = meter.seconds()
    state.peak_memory = max(state.peak_memory, peak_memory(run.device))
    content = {
        "hparams": asdict(run.hp),
        "data": fingerprints,
        "encoder": encoder.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "state": state.state_dict(),
    }
    run.save_checkpoint(content)
    meter.saved_at = time.monotonic()


def raise_if(signum, run, state):
    """Raise Interrupted if a signal came to any process, after the checkpoint was written."""
    if signum:
        distributed.barrier()
        epoch, step = state.position
        command = f"python main.py resume --exp_dir {shlex.quote(str(run.dir))}"
        raise Interrupted(signum, f"stopped at epoch {epoch} step {step}; go on with: {command}")
