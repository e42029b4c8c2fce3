"""Compare the step times with computed and with loaded states, if the last blocks of a GPT-2 small are trained.

Run it as ``python -m benchmarks.feature_cache.steps``. Weights are random, since times do not depend on them. Each pair
of steps runs back to back, so that other load on the machine affects both.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import replace

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from peftbench.common.filesystem import CACHE_DIR_ENV
from peftbench.data.collate import MicroBatch, PaddingFreeCollator
from peftbench.feature_cache.cached_training import CachedFeatureLoss
from peftbench.feature_cache.cut import build_cut
from peftbench.feature_cache.store import StoreLayout, open_store
from peftbench.methods.select_presets import LastBlocks
from peftbench.modeling.loss import build_loss

EXAMPLES, TOKENS, LABELS, PAIRS = 4, 128, 32, 6


def build_batch(vocabulary: int) -> MicroBatch:
    """Return a packed micro-batch of random tokens; the last ``LABELS`` tokens of each example are labeled."""
    ids = torch.randint(1, vocabulary, (EXAMPLES, TOKENS)).tolist()
    spans = [[TOKENS - LABELS, TOKENS]] * EXAMPLES
    return PaddingFreeCollator(0).collate(ids, spans, range(EXAMPLES))


def time_step(loss: CachedFeatureLoss, batch: MicroBatch) -> float:
    """Return the seconds of a forward and backward pass."""
    loss.base.zero_grad()
    start = time.perf_counter()
    with loss.attention_context():
        loss(loss.base, batch).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def measure(num_blocks: int) -> dict[str, float]:
    """Return the median seconds of both kinds of step, and the median of the ratios within pairs."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config()).eval()
    method = LastBlocks(num_blocks=num_blocks)
    part = method.get_frozen_part(method.apply(base, None))  # type: ignore[arg-type]
    method.set_training(base)
    inner, _ = build_loss(base)
    cut = build_cut(base, part, inner)
    layout = StoreLayout(torch.tensor([TOKENS] * EXAMPLES), cut.hidden_size, "fp32", cut.position_kind)
    store = open_store({"blocks": num_blocks}, layout, lambda _: None)
    loss, batch = CachedFeatureLoss(inner, store, cut), build_batch(base.config.vocab_size)
    time_step(loss, replace(batch, feature_mode="save"))
    computed_batch, loaded_batch = batch, replace(batch, feature_mode="load")
    pairs = [(time_step(loss, computed_batch), time_step(loss, loaded_batch)) for _ in range(PAIRS)]
    computed, loaded = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(first / second for first, second in pairs)
    return {"num_blocks": num_blocks, "computed_s": computed, "loaded_s": loaded, "median_ratio": ratio}


def main() -> None:
    """Print one line for each number of trained blocks."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_DIR_ENV] = folder
        for num_blocks in (1, 2, 6):
            print(json.dumps(measure(num_blocks)))


if __name__ == "__main__":
    main()
