"""Held-out loss, generated texts and choices. Each example counts once on any number of processes."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from peftbench.data.encode import count_labels
from peftbench.distributed.sharding import unshard_root
from peftbench.evaluation.outputs import ChoiceScore
from peftbench.modeling.generation import default_generation_config
from peftbench.training.data import build_collator

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.collate import MicroBatch
    from peftbench.data.encode import Encoder
    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.recipe.schema import Evaluate, Recipe
    from peftbench.training.build import AdaptedModel

_T = TypeVar("_T")
HALVED_BATCH_NOTE = "evaluate.batch_size="
"""Start of the note on a batch that ran out of memory."""


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
        is_oom: Callable[[BaseException], bool] = lambda _: False,
    ) -> None:
        """Prepare the evaluation.

        ``synced``: the weights are sharded, so every process must run the model the same number of times.
        ``is_oom``: True for an out-of-memory error, after which a batch is repeated in halves.
        """
        self.context, self.accelerator = context, context.accelerator
        self.model, self.loss_fn = adapted_model.model, adapted_model.loss
        self.encoder = encoder
        self.dataset = dataset
        self.method = recipe.method
        self.config: Evaluate = recipe.evaluate
        self.synced, self.is_oom = synced, is_oom
        self.batch_size = recipe.evaluate.batch_size
        """Examples per batch; halved when a batch runs out of memory."""
        self.notes: list[str] = []
        """Notes for the record."""
        # Evaluation never labels padding, whatever the settings for training.
        self.collator = replace(
            build_collator(recipe, adapted_model.loss, encoder.eos_token_id), label_padding=False, pad_to_length=None
        )

    @cached_property
    def _stop_ids(self) -> list[int]:
        """Ids that end a generated text."""
        return self.encoder.find_stop_ids(self.dataset[0])

    def _map_batches(self, description: str, compute: Callable[[list[dict[str, Any]]], Sequence[_T]]) -> list[_T]:
        """Call ``compute`` with this rank's examples in batches of similar lengths; return one result per example.

        The results of all ranks are in the split's order. A batch that runs out of memory is repeated in halves, unless
        the ranks run the model together (``synced``). Then a rank with fewer batches repeats one that does not count.
        """
        lengths = [len(ids) for ids in self.dataset["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        mine = order[self.context.dp_rank :: self.context.dp_world_size]
        longest = math.ceil(len(order) / self.context.dp_world_size) if self.synced else len(mine)
        results: list[tuple[int, _T]] = []
        start = 0
        is_hidden = None if self.accelerator.is_main_process else True
        with tqdm(total=longest, desc=description, unit="ex", disable=is_hidden, leave=None) as bar:
            while start < longest:
                indices = mine[start : start + self.batch_size]
                values = self._compute_or_halve([self.dataset[index] for index in indices or order[:1]], compute)
                if values is None:
                    continue
                results += zip(indices, values, strict=False)
                bar.update(min(self.batch_size, longest - start))
                start += self.batch_size
        return self._gather_in_order(results)

    def _compute_or_halve(
        self, rows: list[dict[str, Any]], compute: Callable[[list[dict[str, Any]]], Sequence[_T]]
    ) -> Sequence[_T] | None:
        """Return the results of a batch; None if it ran out of memory and the batch size is halved."""
        try:
            return compute(rows)
        except (RuntimeError, MemoryError, OSError) as error:
            if self.synced or len(rows) == 1 or not self.is_oom(error):
                raise
        # Outside of the handler, so that no traceback references the tensors of the failed batch.
        self.batch_size = max(1, len(rows) // 2)
        self._note_halved_batch([self.batch_size])
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def compute_held_out_loss(self) -> HeldOutLoss:
        """Compute the cross-entropy over the labeled tokens of each example, in the split's order."""
        losses = self._map_batches("held-out loss", self._compute_losses)
        return HeldOutLoss(*zip(*losses, strict=True))

    def decode_teacher_forced(self) -> list[str]:
        """Decode the most likely token at each labeled position, given the reference prefix, in the split's order."""
        return self._map_batches("teacher-forced argmax", self._decode_argmax)

    def generate(self) -> list[str]:
        """Generate texts in the split's order: greedy or beam search, with a key-value cache."""
        return self._map_batches("generating", self._generate)

    def score_choices(self) -> list[tuple[ChoiceScore, ...]]:
        """Compute the log-likelihood of each choice of each example after its prompt, in the split's order."""
        return self._map_batches("scoring choices", self._score_choices)

    @torch.no_grad()  # not inference_mode, in which sharded weights cannot be gathered
    def _compute_losses(self, rows: list[dict[str, Any]]) -> list[tuple[float, int]]:
        self.model.eval()
        batch = self._collate(rows)
        # An untrained model was not prepared by accelerate, so it does not autocast by itself.
        with self.context.autocast(), self.loss_fn.attention_context():
            losses = self.loss_fn.per_token(self.model, batch.to(self.accelerator.device)).cpu().double()
        return [(float(one.sum()), len(one)) for one in _split_by_row(rows, losses)]

    def _score_choices(self, rows: list[dict[str, Any]]) -> list[tuple[ChoiceScore, ...]]:
        encoded = [self.encoder.encode_choices(row) for row in rows]
        flat = [choice for choices in encoded for choice in choices]
        # The ranks of sharded weights run the model equally often, whatever their examples' numbers of choices.
        size = len(flat) if self.synced else self.batch_size
        chunks = (flat[start : start + size] for start in range(0, len(flat), size))
        losses = iter([loss for chunk in chunks for loss in self._compute_losses(chunk)])
        return [
            tuple(
                ChoiceScore(
                    text=text,
                    log_likelihood=-nll,
                    num_tokens=num_tokens,
                    num_bytes=len(text.strip().encode()),
                )
                for text, (nll, num_tokens) in zip(self.encoder.task.get_choices(row)[0], losses, strict=False)
            )
            for row in rows
        ]

    @torch.no_grad()
    def _decode_argmax(self, rows: list[dict[str, Any]]) -> list[str]:
        self.model.eval()
        batch = self._collate(rows)
        with self.context.autocast(), self.loss_fn.attention_context():
            best = self.loss_fn.logits(self.model, batch.to(self.accelerator.device)).argmax(-1).cpu()
        references = (
            self._select_reference(row, one) for row, one in zip(rows, _split_by_row(rows, best), strict=True)
        )
        return [self.encoder.decode(one.tolist(), self._stop_ids) for one in references]

    def _select_reference(self, row: dict[str, Any], token_values: torch.Tensor) -> torch.Tensor:
        """Return the values at the labels of the reference, out of those at all labels of the row."""
        length, after = self.encoder.measure_reference(row)
        labeled_after = max(0, row["label_spans"][-1] - (len(row["input_ids"]) - after))
        end = len(token_values) - labeled_after
        return token_values[max(0, end - length) : end]

    @torch.no_grad()
    def _generate(self, rows: list[dict[str, Any]]) -> list[str]:
        self.model.eval()
        prompts = [self.encoder.encode_prompt(row) for row in rows]
        width = max(map(len, prompts))
        padding = [[self.encoder.eos_token_id] * (width - len(prompt)) for prompt in prompts]
        ids = torch.tensor([pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * len(pad) + [1] * (width - len(pad)) for pad in padding])
        with self.context.autocast(), unshard_root(self.model), default_generation_config(self.loss_fn.base):
            new = self.method.generate(
                self.model,
                ids.to(self.accelerator.device),
                mask.to(self.accelerator.device),
                max_new_tokens=self.config.max_new_tokens,
                do_sample=False,
                num_beams=self.config.num_beams,
                use_cache=True,
                eos_token_id=self._stop_ids,
                pad_token_id=self.encoder.eos_token_id,
                synced_gpus=self.synced,
            ).tolist()
        return [self.encoder.decode(tokens, self._stop_ids) for tokens in new]

    def _collate(self, rows: list[dict[str, Any]]) -> MicroBatch:
        return self.collator.collate([row["input_ids"] for row in rows], [row["label_spans"] for row in rows])

    def _gather_in_order(self, local_results: list[tuple[int, _T]]) -> list[_T]:
        gathered = local_results
        if self.accelerator.num_processes > 1:
            gathered = gather_object(local_results)
            self._note_halved_batch(gather_object([self.batch_size]))
        return [one for _, one in sorted(gathered, key=itemgetter(0))]

    def _note_halved_batch(self, batch_sizes: Sequence[int]) -> None:
        """Note the smallest batch if one was halved; ``batch_sizes`` are those of all ranks, or of this one alone."""
        ranks = [rank for rank, size in enumerate(batch_sizes) if size < self.config.batch_size]
        if ranks:
            note = f"{HALVED_BATCH_NOTE}{self.config.batch_size} ran out of memory; it was halved to {min(batch_sizes)}"
            self.notes = [f"{note} on rank {', '.join(map(str, ranks))}" if len(batch_sizes) > 1 else note]


def _split_by_row(rows: Sequence[dict[str, Any]], token_values: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return each row's slice of ``token_values``, which has the labeled tokens of all rows in order."""
    return token_values.split([count_labels(row["label_spans"]) for row in rows])  # type: ignore[no-any-return]
