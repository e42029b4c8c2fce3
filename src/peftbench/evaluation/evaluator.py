"""Held-out loss and generated summaries. Each example counts once on any number of processes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from peftbench.distributed.sharding import unshard_root
from peftbench.evaluation.intervals import bootstrap_interval
from peftbench.evaluation.metrics.registry import compute_scores
from peftbench.record import Interval, PerExample, Quality, Sample
from peftbench.training.data import build_collator

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.collate import MicroBatch
    from peftbench.data.encode import Encoder
    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.profiler.probe import Probe
    from peftbench.recipe.schema import Evaluate, Recipe
    from peftbench.training.build import AdaptedModel

_T = TypeVar("_T")
_MAX_SAMPLE_CHARS = 600  # of an article, in the record


@dataclass(frozen=True)
class HeldOutLoss:
    """Held-out loss of each example, in the split's order."""

    nll_sums: tuple[float, ...]
    """Sum over the example's labeled tokens, in nats."""
    label_counts: tuple[int, ...]
    """Number of the example's labeled tokens."""

    @property
    def loss(self) -> float:
        """Mean over the labeled tokens of all examples, in nats."""
        return math.fsum(self.nll_sums) / sum(self.label_counts)


class Evaluator:
    """Evaluates one model on one encoded split."""

    def __init__(
        self,
        context: AcceleratorContext,
        adapted_model: AdaptedModel,
        encoder: Encoder,
        dataset: Dataset,
        recipe: Recipe,
        *,
        synced: bool = False,
    ) -> None:
        """``synced``: the weights are sharded, so every process must run the model the same number of times."""
        self.context, self.accelerator = context, context.accelerator
        self.model, self.loss_fn = adapted_model.model, adapted_model.loss
        self.encoder = encoder
        self.dataset = dataset
        self.method = recipe.method
        self.config: Evaluate = recipe.evaluate
        self.synced = synced
        # Evaluation always labels the summaries only, whatever the settings for training.
        self.collator = replace(
            build_collator(recipe, adapted_model.loss, encoder.eos_token_id), label_padding=False, pad_to_length=None
        )

    def _iterate_local_batches(self, description: str) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """Yield this rank's examples in batches of similar lengths, and whether the batch counts.

        Ranks can have different numbers of batches. If ``synced``, a rank with fewer repeats one that does not count.
        """
        lengths = [len(ids) for ids in self.dataset["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        mine = order[self.context.dp_rank :: self.context.dp_world_size]
        longest = math.ceil(len(order) / self.context.dp_world_size) if self.synced else len(mine)
        starts = range(0, longest, self.config.batch_size)
        for start in tqdm(starts, desc=description, disable=None if self.accelerator.is_main_process else True):
            indices = mine[start : start + self.config.batch_size]
            yield [{**self.dataset[index], "index": index} for index in indices or order[:1]], bool(indices)

    @torch.no_grad()  # not inference_mode, in which sharded weights cannot be gathered
    def compute_held_out_loss(self) -> HeldOutLoss:
        """Compute the cross-entropy over summary and end tokens of each example, in the split's order."""
        self.model.eval()
        row_losses: list[tuple[int, tuple[float, int]]] = []
        for rows, count in self._iterate_local_batches("held-out loss"):
            batch = self._collate(rows)
            # An untrained model was not prepared by accelerate, so it does not autocast by itself.
            with self.context.autocast(), self.loss_fn.attention_context():
                losses = self.loss_fn.per_token(self.model, batch.to(self.accelerator.device)).cpu().double()
            if count:
                row_losses += [(index, (float(one.sum()), len(one))) for index, one in _split_by_row(rows, losses)]
        summed, counts = zip(*self._gather_in_order(row_losses), strict=True)
        return HeldOutLoss(summed, counts)

    @torch.no_grad()  # not inference_mode, in which sharded weights cannot be gathered
    def decode_teacher_forced(self) -> list[str]:
        """Decode the most likely token at each summary position, given the reference prefix, in the split's order."""
        self.model.eval()
        texts: list[tuple[int, str]] = []
        for rows, count in self._iterate_local_batches("teacher-forced argmax"):
            batch = self._collate(rows)
            with self.context.autocast(), self.loss_fn.attention_context():
                best = self.loss_fn.logits(self.model, batch.to(self.accelerator.device)).argmax(-1).cpu()
            if count:
                texts += [(index, self.encoder.decode(one.tolist())) for index, one in _split_by_row(rows, best)]
        return self._gather_in_order(texts)

    @torch.no_grad()  # not inference_mode, in which sharded weights cannot be gathered
    def generate_summaries(self) -> list[str]:
        """Generate summaries in the split's order: greedy or beam search, with a key-value cache."""
        self.model.eval()
        texts: list[tuple[int, str]] = []
        for rows, count in self._iterate_local_batches("generating"):
            prompts = [self.encoder.encode_prompt(row["article"]) for row in rows]
            width = max(map(len, prompts))
            padding = [[self.encoder.eos_token_id] * (width - len(prompt)) for prompt in prompts]
            ids = torch.tensor([pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
            mask = torch.tensor([[0] * len(pad) + [1] * (width - len(pad)) for pad in padding])
            with self.context.autocast(), unshard_root(self.model):
                new = self.method.generate(
                    self.model,
                    ids.to(self.accelerator.device),
                    mask.to(self.accelerator.device),
                    max_new_tokens=self.config.max_new_tokens,
                    do_sample=False,
                    num_beams=self.config.num_beams,
                    use_cache=True,
                    eos_token_id=self.encoder.eos_token_id,
                    pad_token_id=self.encoder.eos_token_id,
                    synced_gpus=self.synced,
                ).tolist()
            if count:
                texts += [(row["index"], self.encoder.decode(tokens)) for row, tokens in zip(rows, new, strict=True)]
        return self._gather_in_order(texts)

    def evaluate(self, probe: Probe) -> Quality:
        """Run the evaluation of the recipe. Skip generation if the loss is not finite."""
        with probe.phase("evaluate"):
            held_out = self.compute_held_out_loss()
            forced = self.decode_teacher_forced() if self.config.teacher_forced else None
        generated = None
        if self.config.generate and math.isfinite(held_out.loss):
            with probe.phase("generate"):
                generated = self.generate_summaries()
        return build_quality(self.config, self.dataset, generated, held_out=held_out, teacher_forced=forced)

    def _collate(self, rows: list[dict[str, Any]]) -> MicroBatch:
        return self.collator.collate([row["input_ids"] for row in rows], [row["prompt_tokens"] for row in rows])

    def _gather_in_order(self, local_results: list[tuple[int, _T]]) -> list[_T]:
        gathered = gather_object(local_results) if self.accelerator.num_processes > 1 else local_results
        return [one for _, one in sorted(gathered, key=itemgetter(0))]


def _split_by_row(rows: Sequence[dict[str, Any]], token_values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each row's index and its slice of ``token_values``, which has the labeled tokens of all rows in order."""
    # The first token of a row is never predicted, so it has no label even without a prompt.
    labeled = [len(row["input_ids"]) - max(1, row["prompt_tokens"]) for row in rows]
    for row, own in zip(rows, token_values.split(labeled), strict=True):
        yield row["index"], own


def build_quality(
    config: Evaluate,
    dataset: Dataset,
    generated: Sequence[str] | None,
    *,
    held_out: HeldOutLoss | None = None,
    teacher_forced: Sequence[str] | None = None,
) -> Quality:
    """Score generated texts against the split's summaries, in its order, and select the samples to save."""
    references = dataset["summary"]
    examples = zip(dataset["id"], dataset["article"], references, generated or (), strict=False)
    loss = None if held_out is None else held_out.loss
    scores = compute_scores(generated, references) if generated is not None else {}
    shown = compute_scores(teacher_forced, references) if teacher_forced is not None else {}
    return Quality(
        split=config.split,
        num_examples=len(dataset),
        loss=loss,
        perplexity=math.exp(loss) if loss is not None and loss < 700 else None,
        rouge=_compute_intervals(scores, config.bootstrap_resamples) or None,
        teacher_forced_argmax_rouge=_compute_intervals(shown, config.bootstrap_resamples) or None,
        samples=tuple(
            Sample(id=id, article=article[:_MAX_SAMPLE_CHARS], reference=reference, generated=text)
            for (id, article, reference, text), _ in zip(examples, range(config.saved_samples), strict=False)
        ),
        per_example=PerExample(
            examples_fingerprint=_hash_examples(dataset["id"], references),
            loss=held_out.nll_sums if held_out else (),
            labeled_tokens=held_out.label_counts if held_out else (),
            rouge=scores,
        ),
    )


def _compute_intervals(scores: dict[str, tuple[float, ...]], resamples: int) -> dict[str, Interval]:
    return {kind: bootstrap_interval(values, resamples) for kind, values in scores.items()}


def _hash_examples(ids: Sequence[str], references: Sequence[str]) -> str:
    """Return a hash of these examples in this order."""
    return hashlib.blake2b(json.dumps([list(ids), list(references)]).encode(), digest_size=8).hexdigest()
