"""Evaluations while training: nearest neighbours and signs of collapse, on a part of the images."""

import functools
import time

import collapse
from data import balanced_subset
from encode import Output, collapse_signs, encode
from evaluate import knn
from infra import distributed
from infra.console import log
from infra.device import generator
from infra.image_cache import on_device, subset


def quick_evaluation(hp, run, encoder, images, place, bf16):
    """Print and record signs of collapse and, of labelled images, the accuracy of knn; return the seconds that it took."""
    start = time.monotonic()
    distributed.broadcast_buffers(encoder)  # all processes encode with the same batch-norm statistics
    found = collapse_signs(hp, encoder, images["train"], bf16)
    text = collapse.told(found)
    if images["test"] and images["train"].class_names:
        found["knn_top1"] = quick_knn(hp, encoder, images, bf16)
        text = f"kNN {found['knn_top1']:.2f}% {text}"
    run.journal.add(**place, **found)
    log.info(f"epoch {place['epoch']} step {place['step']} | {text}")
    if collapse.advice(found):
        log.warning(f"the representations have {collapse.advice(found)}")
    return time.monotonic() - start


def quick_knn(hp, encoder, images, bf16):
    """Return the accuracy of knn on up to 1,000 test images, from up to 5,000 training images, always the same ones, by up to 4
    views each."""
    tensors = []
    views, device = hp.test_views._replace(n=min(4, hp.test_views.n)), next(encoder.parameters()).device
    for split, limit in (("train", 5000), ("test", 1000)):
        pixels, labels, class_names = images[split]
        some = balanced_subset(labels, len(pixels), min(limit, len(pixels)), generator(hp.seed, f"knn-{split}"))
        rng = functools.partial(generator, hp.seed, f"encode-knn-{split}")
        encoded = encode(encoder, on_device(subset(pixels, some), device), views, rng, hp.bs, Output(hp.emb_pool, bf16=bf16))
        tensors += [encoded["embeddings"].to(device), labels[some].to(device)]
    return knn(*tensors, len(class_names))
