"""Held-out loss and generated summaries, each example counted once on any number of processes."""

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

from peftbench.training.build import build_collator
from peftbench.distributed.sharding import unshard_root
from peftbench.evaluation.metrics.rouge import compute_rouge
from peftbench.evaluation.intervals import bootstrap_interval
from peftbench.record import PerExample, Interval, Quality, Sample

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.collate import MicroBatch
    from peftbench.data.encode import Encoder
    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.training.build import AdaptedModel
    from peftbench.profiler.probe import Probe
    from peftbench.recipe.schema import Evaluate, Recipe

T = TypeVar("T")
_MAX_SAMPLE_CHARS = 600  # of an article, in the record


@dataclass(frozen=True)
class HeldOutLoss:
    """The held-out loss of each example, in the split's order."""

    summed: tuple[float, ...]
    """Nats, over its labelled tokens."""
    labelled: tuple[int, ...]
    """How many those are."""

    @property
    def loss(self) -> float:
        """Mean over the labelled tokens of all examples, in nats."""
        return math.fsum(self.summed) / sum(self.labelled)


class Evaluator:
    """Evaluates one model on one encoded split."""

    def __init__(
        self,
        bound: AcceleratorContext,
        built: AdaptedModel,
        encoder: Encoder,
        dataset: Dataset,
        recipe: Recipe,
        *,
        in_step: bool = False,
    ) -> None:
        """``in_step``: processes share the weights out, so that each must run the model as often as all others."""
        self.bound, self.accelerator = bound, bound.accelerator
        self.model, self.loss_at = built.bare_model, built.loss
        self.encoder = encoder
        self.dataset = dataset
        self.method = recipe.method
        self.knobs: Evaluate = recipe.evaluate
        self.in_step = in_step
        # Whatever the training's labels and widths, here they are those of the summaries.
        self.collator = replace(build_collator(recipe, built.loss, encoder.end), as_published=False, pad_to=None)

    def _mine(self, description: str) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """This rank's share of the examples, in batches of like lengths, and whether they count.

        Ranks may have unequal numbers of batches; in step, those that have fewer repeat one that does not count.
        """
        lengths = [len(ids) for ids in self.dataset["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        mine = order[self.accelerator.process_index :: self.accelerator.num_processes]
        longest = math.ceil(len(order) / self.accelerator.num_processes) if self.in_step else len(mine)
        starts = range(0, longest, self.knobs.batch)
        for start in tqdm(starts, desc=description, disable=None if self.accelerator.is_main_process else True):
            indices = mine[start : start + self.knobs.batch]
            yield [{**self.dataset[index], "index": index} for index in indices or order[:1]], bool(indices)

    @torch.no_grad()  # and not inference_mode, in which shared weights cannot be gathered
    def held_out(self) -> HeldOutLoss:
        """Cross-entropy over summary and end tokens of each example, in the split's order."""
        self.model.eval()
        found: list[tuple[int, tuple[float, int]]] = []
        for rows, count in self._mine("held-out loss"):
            batch = self._collate(rows)
            # A model that was not trained is not prepared to do so itself.
            with self.bound.autocast(), self.loss_at.in_use():
                losses = self.loss_at.by_token(self.model, batch.to(self.accelerator.device)).cpu().double()
            if count:
                found += [(index, (float(one.sum()), len(one))) for index, one in _split_by_row(rows, losses)]
        summed, counts = zip(*self._in_order(found), strict=True)
        return HeldOutLoss(summed, counts)

    @torch.no_grad()  # and not inference_mode, in which shared weights cannot be gathered
    def teacher_forced(self) -> list[str]:
        """The most likely token at each summary position, given the reference before it, in the split's order."""
        self.model.eval()
        texts: list[tuple[int, str]] = []
        for rows, count in self._mine("teacher-forced argmax"):
            batch = self._collate(rows)
            with self.bound.autocast(), self.loss_at.in_use():
                best = self.loss_at.logits(self.model, batch.to(self.accelerator.device)).argmax(-1).cpu()
            if count:
                texts += [(index, self.encoder.decode(one.tolist())) for index, one in _split_by_row(rows, best)]
        return self._in_order(texts)

    @torch.no_grad()  # and not inference_mode, in which shared weights cannot be gathered
    def summaries(self) -> list[str]:
        """Generated summaries, in the split's order: greedy or by beams, with cached keys and values."""
        self.model.eval()
        texts: list[tuple[int, str]] = []
        for rows, count in self._mine("generating"):
            prompts = [self.encoder.prompt(row["article"]) for row in rows]
            width = max(map(len, prompts))
            padding = [[self.encoder.end] * (width - len(prompt)) for prompt in prompts]
            ids = torch.tensor([pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
            mask = torch.tensor([[0] * len(pad) + [1] * (width - len(pad)) for pad in padding])
            with self.bound.autocast(), unshard_root(self.model):
                new = self.method.generate(
                    self.model, ids.to(self.accelerator.device), mask.to(self.accelerator.device),
                    max_new_tokens=self.knobs.max_new_tokens, do_sample=False, num_beams=self.knobs.beams,
                    use_cache=True, eos_token_id=self.encoder.end, pad_token_id=self.encoder.end,
                    synced_gpus=self.in_step,
                ).tolist()  # fmt: skip
            if count:
                texts += [(row["index"], self.encoder.decode(tokens)) for row, tokens in zip(rows, new, strict=True)]
        return self._in_order(texts)

    def quality(self, probe: Probe) -> Quality:
        """Everything the recipe asks to be measured; a model whose loss is no number is not asked to write."""
        with probe.phase("evaluate"):
            held_out = self.held_out()
            forced = self.teacher_forced() if self.knobs.teacher_forced else None
        generated = None
        if self.knobs.generate and math.isfinite(held_out.loss):
            with probe.phase("generate"):
                generated = self.summaries()
        return build_quality(self.knobs, self.dataset, generated, held_out=held_out, forced=forced)

    def _collate(self, rows: list[dict[str, Any]]) -> MicroBatch:
        return self.collator.collate([row["input_ids"] for row in rows], [row["prompt_tokens"] for row in rows])

    def _in_order(self, found: list[tuple[int, T]]) -> list[T]:
        gathered = gather_object(found) if self.accelerator.num_processes > 1 else found
        return [one for _, one in sorted(gathered, key=itemgetter(0))]


def _split_by_row(rows: Sequence[dict[str, Any]], of_labels: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each row's index and its own of what is there for all labelled tokens, row by row as the collator labels them."""
    # The first token of a row is never predicted, so that without a prompt it has no label either.
    labelled = [len(row["input_ids"]) - max(1, row["prompt_tokens"]) for row in rows]
    for row, own in zip(rows, of_labels.split(labelled), strict=True):
        yield row["index"], own


def build_quality(
    knobs: Evaluate,
    dataset: Dataset,
    generated: Sequence[str] | None,
    *,
    held_out: HeldOutLoss | None = None,
    forced: Sequence[str] | None = None,
) -> Quality:
    """Scores of generated texts against the split's summaries, in its order, and the samples to keep."""
    references = dataset["summary"]
    kept = zip(dataset["id"], dataset["article"], references, generated or (), strict=False)
    loss = None if held_out is None else held_out.loss
    scores = compute_rouge(generated, references) if generated is not None else {}
    shown = compute_rouge(forced, references) if forced is not None else {}
    return Quality(
        split=knobs.split,
        examples=len(dataset),
        loss=loss,
        perplexity=math.exp(loss) if loss is not None and loss < 700 else None,
        rouge=_compute_intervals(scores, knobs.resamples) or None,
        teacher_forced_argmax_rouge=_compute_intervals(shown, knobs.resamples) or None,
        samples=tuple(
            Sample(id=id, article=article[:_MAX_SAMPLE_CHARS], reference=reference, generated=text)
            for (id, article, reference, text), _ in zip(kept, range(knobs.samples), strict=False)
        ),
        by_example=PerExample(
            identity=_hash_examples(dataset["id"], references),
            loss=held_out.summed if held_out else (),
            labelled=held_out.labelled if held_out else (),
            rouge=scores,
        ),
    )


def _compute_intervals(scores: dict[str, tuple[float, ...]], resamples: int) -> dict[str, Interval]:
    return {kind: bootstrap_interval(values, resamples) for kind, values in scores.items()}


def _hash_examples(ids: Sequence[str], references: Sequence[str]) -> str:
    """Of these examples in this order."""
    return hashlib.blake2b(json.dumps([list(ids), list(references)]).encode(), digest_size=8).hexdigest()
