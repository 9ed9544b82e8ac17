"""Stage 1: train the encoder. train_step is one step of the method; the rest is the loop, its reports and checkpoints."""

import math
import shlex
import time
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from experiment import STATE, n_steps_in, position
from forecast import tell_end, warn_of_few_steps
from infra import distributed
from infra.console import log, log_stage, progress_bar, time_left
from infra.device import generator, peak_memory
from infra.errors import RunError
from infra.image_cache import batches, index_for, on_device
from infra.signals import Interrupted, hold_signals
from loss import emp_ssl_loss
from optimizers import build_optimizer, learning_rate, load_momenta
from patches import batch_params, render
from picture import draw_patches
from quick import quick_evaluation

SHOW_EVERY = 5.0  # seconds without a report after which the losses are shown all the same
STEP_METRICS = ("invariance loss", "uniformity loss", "gradient norm")  # of each step, in this order
REMEDY = "the last checkpoint is kept: lower lr (or set precision: fp32) in hparams.yaml, then resume"


@dataclass
class TrainState:
    """State of the training loop. The fields in STATE are saved; the clocks belong to this process."""

    n_steps: int  # in an epoch
    step: int = 0  # steps done, over all epochs
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(3))  # sums of STEP_METRICS over n_totals steps of this epoch
    n_totals: int = 0
    recent: list = field(default_factory=list)  # STEP_METRICS (3,) of each step after those, on the device
    seconds: float = 0.0  # of training, up to resumed_at
    peak_memory: int = 0  # bytes
    resumed_at: float = 0.0  # time.monotonic() at the start, and when seconds was last updated
    saved_at: float = 0.0
    reported_at: float = 0.0
    n_timed: int = 0  # steps since reported_at
    shown_at: float = 0.0
    end_is_told: bool = False

    def state_dict(self):
        recent = torch.stack(self.recent).cpu() if self.recent else torch.zeros(0, 3)
        return {name: getattr(self, name) for name in STATE} | {"recent": recent}

    def load_state_dict(self, content, device):
        for name in STATE:
            setattr(self, name, content[name])
        self.recent = list(content["recent"].to(device))

    def add(self, metrics):
        """Count a step."""
        self.recent.append(metrics)
        self.step += 1
        self.n_timed += 1

    def clear_totals(self):
        self.totals, self.n_totals, self.recent = torch.zeros(3), 0, []

    @property
    def position(self):
        """(epoch, steps done in it)."""
        return divmod(self.step, max(1, self.n_steps))

    def place(self, epoch):
        """Return where a line of metrics.jsonl belongs: the epoch, and the steps done in it and in all."""
        return {"epoch": epoch, "step": self.step - epoch * self.n_steps, "global_step": self.step}


def train_step(network, optimizer, images, generator, views, criterion, max_patches=None, bf16=False):
    """Train on one batch and return STEP_METRICS (3,) on the device; the host never waits for it.

    network: a model.Encoder, possibly wrapped. images: uint8 (B, 3, H, W) on its device. With several processes they are
    this one's shard, and the losses are those of the whole batch. generator: a CPU torch.Generator. views: patches.Views.
    criterion: z (P, B, d) -> (total, invariance, uniformity). max_patches: patches in the network at once, None for all.
    bf16: run the network under bfloat16 autocast.
    """
    params = batch_params(images.shape, views.n, generator, *distributed.shard_offset(len(images)), augment=views.augment)
    sample = partial(render, images, size=views.size or images.shape[-1])  # rows of params -> (n, 3, S, S)
    z, backward = project(network, sample, params, max_patches, bf16)  # (P B, d)
    z = z.unflatten(0, (views.n, -1))  # (P B, d) -> (P, B, d)
    total, invariance, uniformity = criterion(distributed.all_gather(z))
    optimizer.zero_grad()
    backward(total)
    grad_norm = torch.nn.utils.get_total_norm(p.grad for p in network.parameters() if p.grad is not None)
    optimizer.step()
    return torch.stack([invariance, uniformity, grad_norm]).detach()


def project(network, sample, params, max_patches, bf16):
    """Return (z, backward): z (n, d) of the n patches sample(params), and a function that backpropagates a loss of z.

    With more than max_patches patches, z is computed chunk by chunk without a graph. backward computes the gradient of z and
    then samples the chunks and passes them through the network again, so that the patches and activations of only one chunk
    are alive. The running statistics of batch norm see each chunk twice.
    Source: arXiv 2101.06983, section 3.2 (gradient cache).
    """
    n = len(params["image"])
    n_chunks = math.ceil(n / (max_patches or n))

    def forward(chunk):
        x = sample(chunk)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return network(x)[1]  # (len(x), d)

    if n_chunks == 1:
        return forward(params), torch.Tensor.backward
    chunked = {name: values.tensor_split(n_chunks) for name, values in params.items()}
    chunks = [{name: parts[i] for name, parts in chunked.items()} for i in range(n_chunks)]
    with torch.no_grad():
        z = torch.cat([forward(chunk) for chunk in chunks])  # (n, d)
    z.requires_grad_()

    def backward(total):
        total.backward()
        for i, (chunk, grad) in enumerate(zip(chunks, z.grad.tensor_split(n_chunks), strict=True)):
            with distributed.no_sync(network, enabled=i < n_chunks - 1):
                forward(chunk).backward(grad)

    return z, backward


def build_step(hp, network, optimizer, bf16):
    """Return train_step with the settings of a run: a function of (images, generator)."""
    options = {"eps": hp.tcr_eps} if hp.uniformity_loss == "tcr" else {}
    criterion = partial(emp_ssl_loss, uniformity_loss=hp.uniformity_loss, invariance_weight=hp.invariance_loss_weight,
                        uniformity_weight=hp.uniformity_loss_weight, bags=hp.bags, **options)  # fmt: skip
    return partial(train_step, network, optimizer, views=hp.train_views, criterion=criterion, max_patches=hp.max_patches,
                   bf16=bf16)  # fmt: skip


def train(hp, run, encoder, images, bf16):
    """Train the encoder in place, from run.checkpoint (None: from the start) to hp.n_epochs. Return at once if that is done.

    Raises RunError if a loss, gradient or weight is not finite, and Interrupted after a signal, when the checkpoint is
    written. Each step depends only on the state, the seed, the epoch and the step, so a run that was stopped and resumed
    ends with the same bits as one that was not.
    """
    if run.is_trained():
        return
    log_stage("Training SSL encoder")
    device = next(encoder.parameters()).device
    pixels = on_device(images["train"].images, device)  # uint8 (N, 3, H, W)
    draw_patches(hp, images["train"], run.patches)
    optimizer = build_optimizer(hp, encoder, bf16)
    state = restore(hp, run, optimizer, n_steps=len(pixels) // hp.bs, device=device)
    save = partial(save_checkpoint, hp, run, images.fingerprints, encoder, optimizer, state)
    if not run.checkpoint:
        warn_of_few_steps(hp, len(pixels))
        save()  # fail now if the folder is not writable

    encoder.train()
    network = distributed.data_parallel(encoder, device)  # it shares the encoder's weights
    step = build_step(hp, torch.compile(network) if hp.compile else network, optimizer, bf16)
    with hold_signals(partial(log.info, "* Stopping at the end of this step; a second signal leaves at once")) as signals:

        def after_step(epoch, epoch_is_over):
            if hp.eval_freq and state.step % hp.eval_freq == 0:
                seconds = quick_evaluation(hp, run, encoder, images, state.place(epoch), bf16)
                state.reported_at += seconds  # not counted in the speed
            due = time.monotonic() - state.saved_at > hp.checkpoint_every
            signum, due = distributed.all_reduce_max(signals[0] if signals else 0, due)
            if (signum or due) and not epoch_is_over:
                save()
                raise_if(signum, run, state)

        while state.step < n_steps_in(hp.n_epochs, state.n_steps):
            train_epoch(hp, run, state, pixels, optimizer, step, after_step)
            save()
            raise_if(*distributed.all_reduce_max(signals[0] if signals else 0), run, state)
    raise_if(*distributed.all_reduce_max(signals[0] if signals else 0), run, state)  # a signal after the last look
    distributed.broadcast_buffers(encoder)


def train_epoch(hp, run, state, pixels, optimizer, step, after_step):
    """Train to the end of the epoch, or to the end of training if that comes first."""
    epoch, first = state.position
    n_total = n_steps_in(hp.n_epochs, state.n_steps)
    last = min(state.n_steps, n_total - epoch * state.n_steps)
    device = optimizer.param_groups[0]["params"][0].device
    order = index_for(pixels, torch.randperm(len(pixels), generator=generator(hp.seed, "order", epoch)), device)
    rows = [distributed.shard(order[i * hp.bs : (i + 1) * hp.bs]) for i in range(first, last)]
    bar = progress_bar(range(first, last), f"epoch {epoch}", total=last, initial=first)
    for i, batch in zip(bar, batches(pixels, rows, device), strict=False):
        lr = learning_rate(hp, state.step / n_total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        state.add(step(batch, generator(hp.seed, "patches", epoch, i)))
        if (i + 1) % hp.print_freq == 0 or i + 1 == last:
            report(hp, run, state, epoch, lr, bar)
        elif time.monotonic() - state.shown_at > SHOW_EVERY:
            show(hp, state, epoch, lr, bar)
        after_step(epoch, epoch_is_over=i + 1 == last)
    invariance, uniformity, _ = (state.totals / state.n_totals).tolist()
    log.info(f"Epoch: {epoch} | Loss sim: {invariance:.5f} | Loss {hp.uniformity_loss.upper()}: {uniformity:.5f}")
    if last == state.n_steps:
        state.clear_totals()


def report(hp, run, state, epoch, lr, bar):
    """Print the mean of STEP_METRICS since the last report, append it to metrics.jsonl, and add the steps to the totals."""
    check_finite(state)
    rows = torch.stack(state.recent).cpu()  # (steps, 3); the host waits for the device here, not in each step
    state.totals, state.n_totals, state.recent = state.totals + rows.sum(0), state.n_totals + len(rows), []
    invariance, uniformity, grad_norm = rows.mean(0).tolist()
    now, patches_per_step = time.monotonic(), hp.n_patches * hp.bs
    speed = state.n_timed * patches_per_step / (now - state.reported_at)
    state.n_timed, state.reported_at = 0, now
    state.shown_at = now
    place = state.place(epoch)
    run.journal.add(**place, loss_sim=invariance, loss_uniformity=uniformity, grad_norm=grad_norm, lr=lr,
                    patches_per_second=round(speed, 1))  # fmt: skip
    print_step(bar, epoch, place["step"], rows.mean(0), lr, speed / patches_per_step, patches_per_step)


def show(hp, state, epoch, lr, bar):
    """Print the mean of STEP_METRICS since the last report, between two reports of a slow machine; nothing is recorded. At the
    first time, also print when training will end."""
    now, patches_per_step = time.monotonic(), hp.n_patches * hp.bs
    rate = state.n_timed / (now - state.reported_at)  # steps per second
    state.shown_at = now
    print_step(bar, epoch, state.place(epoch)["step"], torch.stack(state.recent).mean(0).cpu(), lr, rate, patches_per_step)
    if not state.end_is_told:
        state.end_is_told = True
        tell_end((n_steps_in(hp.n_epochs, state.n_steps) - state.step) / rate, state.recent[0].device)


def print_step(bar, epoch, step, means, lr, rate, patches_per_step):
    """Print the means of STEP_METRICS (3,), beside the bar or as a line. rate: steps per second."""
    invariance, uniformity, _ = means.tolist()
    text = f"sim {invariance:.4f} uniformity {uniformity:.3f} lr {lr:.4f} {rate * patches_per_step:,.0f} patches/s"
    if bar.disable:
        log.info(f"epoch {epoch} step {step}/{bar.total} | {text}, {time_left(bar.total - step, rate)} left")
    else:
        bar.set_postfix_str(text)


def raise_if(signum, run, state):
    """Raise Interrupted if a signal came to any process, after the checkpoint was written."""
    if signum:
        distributed.barrier()
        epoch, step = state.position
        command = f"python main.py resume --exp_dir {shlex.quote(str(run.dir))}"
        raise Interrupted(signum, f"stopped at epoch {epoch} step {step}; go on with: {command}")


def restore(hp, run, optimizer, n_steps, device):
    """Return the TrainState of the run's checkpoint; load its momenta, and cut metrics.jsonl to where it was."""
    state, checkpoint = TrainState(n_steps), run.checkpoint
    if checkpoint:
        load_momenta(optimizer, checkpoint["optimizer"])
        state.load_state_dict(checkpoint["state"], device)
        epoch, step = position(checkpoint)
        if "bs" in run.changed:  # keep the position in images; the losses so far are of another batch size
            old_bs, _ = run.changed["bs"]
            left = n_steps_in(hp.n_epochs, n_steps) - epoch * n_steps
            step = min(step * old_bs // hp.bs, n_steps - 1, left - 1)
            state.n_steps, state.step = n_steps, epoch * n_steps + step
            state.clear_totals()
        log.info(f"* Going on at epoch {epoch} step {step}")
    run.journal.begin("training", checkpoint["metrics_bytes"] if checkpoint else 0)
    for name, (old, new) in run.changed.items():
        run.journal.add(event="changed", **state.place(state.position[0]), name=name, old=old, new=new)
    state.resumed_at = state.saved_at = state.reported_at = state.shown_at = time.monotonic()
    return state


def save_checkpoint(hp, run, fingerprints, encoder, optimizer, state):
    """Write a checkpoint. Raises RunError, and writes nothing, if a loss, gradient or weight is not finite."""
    check_finite(state)
    if not all(value.isfinite().all() for value in encoder.state_dict().values()):
        epoch, step = state.position
        raise RunError(f"epoch {epoch} step {step}: weights are not finite; {REMEDY}")
    now = time.monotonic()
    state.seconds, state.resumed_at = state.seconds + now - state.resumed_at, now
    state.peak_memory = max(state.peak_memory, peak_memory(next(encoder.parameters()).device))
    run.save_checkpoint({"hparams": asdict(hp), "data": fingerprints, "encoder": encoder.state_dict(),
                         "optimizer": optimizer.state_dict()["state"], "state": state.state_dict()})  # fmt: skip
    state.saved_at = time.monotonic()


def check_finite(state):
    """Raise RunError that names the step and the value if STEP_METRICS since the last report are not all finite."""
    for i, values in enumerate(torch.stack(state.recent).tolist() if state.recent else []):
        for name, value in zip(STEP_METRICS, values, strict=True):
            if not math.isfinite(value):
                epoch, step = divmod(state.step - len(state.recent) + i, state.n_steps)
                raise RunError(f"epoch {epoch} step {step}: the {name} is {value}; {REMEDY}")
