"""The optimizer of a run, its learning rate and its state."""

import math

import torch

from infra.errors import UsageError
from lars import LARS
from muon import Muon


def build_optimizer(hp, encoder, bf16=False):
    """Return the optimizer of a run, over the weights that are not frozen. LARS has the authors' trust coefficient, .005."""
    params = [p for p in encoder.parameters() if p.requires_grad]
    if hp.optimizer == "muon":
        return Muon(params, hp.lr, bf16=bf16)
    if hp.optimizer == "adamw":
        return torch.optim.AdamW(params, hp.lr, weight_decay=hp.weight_decay)
    if hp.optimizer == "sgd":
        return torch.optim.SGD(params, hp.lr, momentum=0.9, weight_decay=hp.weight_decay, nesterov=True)
    return LARS(params, hp.lr, momentum=0.9, weight_decay=hp.weight_decay, nesterov=True, eta=0.005, clip=True)


def learning_rate(hp, progress):
    """Return the learning rate of a step; progress, in [0, 1), is the fraction of all steps that are done before it."""
    return hp.lr if hp.schedule == "constant" else hp.lr * (1 + math.cos(math.pi * progress)) / 2


def load_momenta(optimizer, momenta):
    """Load the momenta of a checkpoint. Raises UsageError if their shapes are not those of the parameters."""
    shapes = {i: {p.shape} for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    if {i: {value.shape for value in entry.values() if value.ndim} for i, entry in momenta.items()} not in ({}, shapes):
        raise UsageError("the momenta of the checkpoint do not fit its weights")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": momenta})
