"""Batches: one order for every method, micro-batch size and number of processes, and exact counts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch

from peftbench.data.batches import Batches, GlobalBatch, _split_evenly
from peftbench.data.collate import Collator, FlopUnits, MicroBatch, PaddingFreeCollator, TokenCounts
from peftbench.errors import OutOfRangeError
from tests.helpers.batches import labels_of
from tests.helpers.sweeps import mark_slow

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLES = 40
PAD = 0
SPLITS = [
    (global_batch, micro_batch, world_size)
    for global_batch, micro_batch, world_size in itertools.product(
        (1, 2, 6, 8, 12, 40), (None, 1, 2, 3, 5, 64), (1, 2, 3, 4)
    )
    if global_batch % world_size == 0
]
"""Every allowed way to split a step: (global batch size, micro-batch size, processes)."""


def length(index: int) -> int:
    """Return the number of tokens of an example; lengths are not sorted, and some are equal."""
    return 3 + (index * 7) % 11


def prompt(index: int) -> int:
    """Return the number of prompt tokens of an example; at least one, and at least one token is labeled."""
    return 1 + index % (length(index) - 1)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Return encoded examples whose tokens identify them: example 3 is 400, 401, 402, ..."""
    from datasets import Dataset

    ids = [[(index + 1) * 100 + position for position in range(length(index))] for index in range(EXAMPLES)]
    return Dataset.from_dict(
        {"input_ids": ids, "label_spans": [[prompt(index), length(index)] for index in range(EXAMPLES)]}
    )


def batches(
    dataset: Dataset,
    global_batch: int = 8,
    micro_batch: int | None = None,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    collator: Collator | None = None,
) -> Batches:
    """Return the batches over ``dataset``."""
    return Batches(dataset, collator or Collator(PAD), global_batch, micro_batch, seed, rank, world_size)


def take(global_batches: Batches, count: int) -> list[GlobalBatch]:
    """Return the first ``count`` global batches."""
    return list(itertools.islice(global_batches, count))


def rows(micro_batch: MicroBatch) -> list[int]:
    """Return the indices of the examples in a micro-batch."""
    return [int(row[0]) // 100 - 1 for row in micro_batch.input_ids]


def examples(batch: GlobalBatch) -> list[int]:
    """Return the indices of the examples that a rank processes in a step."""
    return [index for micro_batch in batch.micro_batches for index in rows(micro_batch)]


def every_rank(dataset: Dataset, split: tuple[int, int | None, int], count: int) -> list[list[GlobalBatch]]:
    """Return the global batch of every rank, for each of the first ``count`` steps."""
    global_batch, micro_batch, world_size = split
    ranks = [
        take(batches(dataset, global_batch, micro_batch, rank=rank, world_size=world_size), count)
        for rank in range(world_size)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]


# --- order -----------------------------------------------------------------------------------------------------------


def test_order_depends_on_the_seed(dataset: Dataset) -> None:
    """The same seed gives the same order, and other seeds give other orders."""
    orders = {seed: list(itertools.islice(batches(dataset, seed=seed).sample_indices(), 100)) for seed in range(3)}
    assert list(itertools.islice(batches(dataset, seed=0).sample_indices(), 100)) == orders[0]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_order_is_independent_of_torch_s_global_generator(dataset: Dataset) -> None:
    """Sampling does not use the global generator, which e.g. initializes weights."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    order = list(itertools.islice(batches(dataset).sample_indices(), 50))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert list(itertools.islice(batches(dataset).sample_indices(), 50)) == order


def test_splits_cover_every_number_of_processes() -> None:
    """The list of splits is long, and has one to four processes."""
    assert len(SPLITS) > 50
    assert {world_size for _, _, world_size in SPLITS} == {1, 2, 3, 4}


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_step_has_the_same_examples_for_every_split(split: tuple[int, int | None, int], dataset: Dataset) -> None:
    """Over all ranks and micro-batches, a step has each of the next examples in the order once."""
    global_batch = split[0]
    order = batches(dataset).sample_indices()
    for step in every_rank(dataset, split, 3):
        indices = [index for rank in step for index in examples(rank)]
        assert Counter(indices) == Counter(itertools.islice(order, global_batch))
        assert len(indices) == global_batch


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_ranks_have_equal_numbers_of_micro_batches(split: tuple[int, int | None, int], dataset: Dataset) -> None:
    """No micro-batch is empty or larger than the limit, and their sizes differ by at most one."""
    global_batch, micro_batch, world_size = split
    expected = batches(dataset, global_batch, micro_batch, world_size=world_size).gradient_accumulation_steps
    for step in every_rank(dataset, split, 3):
        assert [len(rank.micro_batches) for rank in step] == [expected] * world_size
        sizes = [len(part.input_ids) for rank in step for part in rank.micro_batches]
        assert min(sizes) >= 1
        assert max(sizes) <= (micro_batch or global_batch // world_size)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "accumulation"),
    [(8, None, 1, 1), (8, 8, 1, 1), (8, 3, 1, 3), (8, 1, 1, 8), (8, None, 4, 1), (8, 1, 4, 2), (8, 64, 2, 1)],
)
def test_gradient_accumulation_steps(
    global_batch: int, micro_batch: int | None, world_size: int, accumulation: int, dataset: Dataset
) -> None:
    """The number of micro-batches is the lowest that the limit allows; without a limit it is one."""
    assert (
        batches(dataset, global_batch, micro_batch, world_size=world_size).gradient_accumulation_steps == accumulation
    )


@pytest.mark.parametrize("global_batch", [4, 8, 40])
def test_epoch_has_each_example_once(global_batch: int, dataset: Dataset) -> None:
    """Each epoch has every example once, in another order."""
    steps = EXAMPLES // global_batch
    indices = [index for batch in take(batches(dataset, global_batch, 2), 3 * steps) for index in examples(batch)]
    epochs = [indices[start : start + EXAMPLES] for start in range(0, 3 * EXAMPLES, EXAMPLES)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(EXAMPLES))] * 3
    order = list(itertools.islice(batches(dataset).sample_indices(), 2 * EXAMPLES))
    assert order[:EXAMPLES] != order[EXAMPLES:]


def test_batch_can_continue_into_the_next_epoch(dataset: Dataset) -> None:
    """No example is dropped if the batch size does not divide their number: 4 steps of 30 are 3 epochs of 40."""
    indices = [index for batch in take(batches(dataset, 30), 4) for index in examples(batch)]
    assert Counter(indices) == dict.fromkeys(range(EXAMPLES), 3)


def test_micro_batches_group_similar_lengths(dataset: Dataset) -> None:
    """Within a step, examples are sorted by length, so that little padding is needed."""
    batch = take(batches(dataset, 12, 3), 1)[0]
    lengths = [length(index) for index in examples(batch)]
    assert lengths == sorted(lengths)
    assert len(batch.micro_batches) == 4


@pytest.mark.parametrize(("global_batch", "world_size"), [(8, 3), (1, 2), (6, 4)])
def test_indivisible_global_batch_is_refused(global_batch: int, world_size: int, dataset: Dataset) -> None:
    """The error has the global batch size and the number of processes."""
    with pytest.raises(
        OutOfRangeError, match=f"global_batch_size={global_batch} is not divisible by {world_size} proc"
    ):
        batches(dataset, global_batch, world_size=world_size)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "global_batch", "epochs", "steps"),
    [
        (40, 8, 1.0, 5),
        (40, 8, 2.0, 10),
        (40, 16, 1.0, 3),
        (40, 8, 0.5, 3),
        (40, 8, 0.01, 1),
        (40, 64, 1.0, 1),
        (100, 10, 1.1, 11),
        (1000, 10, 1.1, 110),
    ],
)
def test_epochs_are_converted_to_steps(count: int, global_batch: int, epochs: float, steps: int) -> None:
    """Steps are epochs * examples / global batch size, rounded up; a rounding error adds no step."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"input_ids": [[1, 2]] * count, "label_spans": [[1, 2]] * count})
    assert batches(dataset, global_batch).count_steps(None, epochs) == steps
    assert batches(dataset, global_batch).count_steps(7, None) == 7


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_counts_are_summed_over_all_ranks(split: tuple[int, int | None, int], dataset: Dataset) -> None:
    """Every rank has the counts of the whole step: tokens, labels and computed positions."""
    for step in every_rank(dataset, split, 2):
        indices = [index for rank in step for index in examples(rank)]
        shapes = [part.input_ids.shape for rank in step for part in rank.micro_batches]
        expected = TokenCounts(
            real=sum(length(index) for index in indices),
            padded=sum(height * width for height, width in shapes),
            labeled=sum(length(index) - prompt(index) for index in indices),
        )
        assert [rank.token_counts for rank in step] == [expected] * len(step)


@pytest.mark.parametrize("micro_batch", [1, 2, None])
def test_counts_are_independent_of_the_number_of_processes(micro_batch: int | None, dataset: Dataset) -> None:
    """All counts are equal for 1, 2 and 4 processes; without a micro-batch limit, all except padding."""
    collator = Collator(PAD, virtual_tokens=5)
    counts = [
        take(batches(dataset, 8, micro_batch, world_size=world_size, collator=collator), 3) for world_size in (1, 2, 4)
    ]
    for step in zip(*counts, strict=True):
        assert (
            len({(batch.token_counts.real, batch.token_counts.labeled, batch.token_counts.virtual) for batch in step})
            == 1
        )
        if micro_batch is not None:
            assert len({batch.token_counts for batch in step}) == 1


def test_collate_and_counts_match_hand_computed_values() -> None:
    """Two rows of 5 and 3 tokens with prompts of 2 and 1, and the sum of their counts with another batch's."""
    collator = Collator(PAD, virtual_tokens=4)
    batch = collator.collate([[11, 12, 13, 14, 15], [21, 22, 23]], [[2, 5], [1, 3]])
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 15], [21, 22, 23, PAD, PAD]]
    assert batch.attention_mask is None  # a causal model does not attend to later positions
    assert batch.lengths == (5, 3)
    ignored = -100
    assert labels_of(batch, virtual_tokens=4).tolist() == [
        [ignored, ignored, 13, 14, 15],
        [ignored, 22, 23, ignored, ignored],
    ]
    assert batch.logit_indices.tolist() == [4 + 1, 4 + 2, 4 + 3, 9 + 4 + 0, 9 + 4 + 1]
    assert batch.targets.tolist() == [13, 14, 15, 22, 23]
    counts = collator.count_tokens(batch)
    assert counts == TokenCounts(real=8, padded=10, labeled=5, virtual=8)
    assert counts + TokenCounts(1, 2, 3, 4) == TokenCounts(9, 12, 8, 12)


def test_first_position_is_not_labeled() -> None:
    """A row without a prompt has one label fewer than tokens: nothing predicts its first token."""
    collator = Collator(PAD)
    assert collator.count_tokens(collator.collate([[1, 2, 3]], [[0, 3]])).labeled == 2


def test_padding_to_a_length_changes_the_padded_count_only() -> None:
    """Every micro-batch is padded to this width."""
    narrow, wide = Collator(PAD), Collator(PAD, pad_to_length=9)
    rows_and_spans = ([[11, 12, 13], [21, 22]], [[1, 3], [1, 2]])
    batch = wide.collate(*rows_and_spans)
    assert batch.input_ids.shape == labels_of(batch).shape == (2, 9)
    assert batch.input_ids[:, 3:].eq(PAD).all()
    assert batch.lengths == (3, 2)
    counts, expected = wide.count_tokens(batch), narrow.count_tokens(narrow.collate(*rows_and_spans))
    assert (counts.real, counts.labeled, counts.padded) == (expected.real, expected.labeled, 18)


def test_virtual_tokens_do_not_change_batches(dataset: Dataset) -> None:
    """Methods with and without virtual tokens get the same rows in the same micro-batches."""
    with_virtual = take(batches(dataset, 8, 3, collator=Collator(PAD, virtual_tokens=20)), 3)
    without = take(batches(dataset, 8, 3), 3)
    for one, other in zip(with_virtual, without, strict=True):
        assert [rows(part) for part in one.micro_batches] == [rows(part) for part in other.micro_batches]
        assert one.token_counts.virtual == 8 * 20
        assert other.token_counts.virtual == 0


# --- as published ----------------------------------------------------------------------------------------------------


def test_label_padding_labels_every_position() -> None:
    """Prompts and padding are labeled and counted, as in the published study."""
    collator = Collator(PAD, pad_to_length=6, label_padding=True)
    batch = collator.collate([[11, 12, 13], [21, 22]], [[1, 3], [1, 2]])
    labels = labels_of(batch)
    assert torch.equal(labels[:, 1:], batch.input_ids[:, 1:])
    assert labels[:, 0].eq(-100).all()  # nothing predicts the first token
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert collator.count_tokens(batch) == TokenCounts(real=5, padded=12, labeled=10, virtual=0)
    batch.targets[0] = 99
    assert batch.input_ids[0, 1] == 12  # labels are a copy


def test_label_padding_keeps_the_sampled_order(dataset: Dataset) -> None:
    """Examples are not sorted by length, as in the published study."""
    unsorted = batches(dataset, 8, 2, collator=Collator(PAD, label_padding=True))
    order = list(itertools.islice(unsorted.sample_indices(), 8))
    assert examples(take(unsorted, 1)[0]) == order
    assert [length(index) for index in order] != sorted(length(index) for index in order)


def test_padding_to_a_multiple_matches_hand_computed_values() -> None:
    """Virtual tokens count towards the multiple, and no row exceeds the model's positions."""
    padder, packer = Collator(PAD, 4, pad_to_multiple_of=8), PaddingFreeCollator(PAD, 4, pad_to_multiple_of=8)
    rows, spans = [[5] * 7, [6] * 9], [[3, 7], [4, 9]]
    padded, packed = padder.collate(rows, spans), packer.collate(rows, spans)
    assert padded.input_ids.shape == (2, 12)
    assert padder.count_positions([7, 9]) == 2 * 16
    assert packed.input_ids.tolist() == [[PAD] * 4 + [5] * 7 + [PAD] * 4 + [6] * 9]
    assert packer.count_positions([7, 9]) == 24
    three = packer.collate([*rows, [7]], [*spans, [1, 1]])
    assert three.packed_sequences is not None
    assert three.packed_sequences.lengths == (11, 13, 5, 3)
    assert three.packed_sequences.virtual_token_indices.tolist() == [0, 1, 2, 3, 11, 12, 13, 14, 24, 25, 26, 27]
    assert three.packed_sequences.position_ids[0, -3:].tolist() == [0, 1, 2]
    assert three.lengths == (7, 9, 1)
    assert three.input_ids.shape[1] == packer.count_positions([7, 9, 1]) == 32
    assert packer.count_tokens(three) == TokenCounts(17, 20, 9, 12)
    assert packer.model_flop_units(three) == FlopUnits(29, 11**2 + 13**2 + 5**2, 66 + 91 + 15, 9, 29)
    assert packer.hardware_flop_units(three) == FlopUnits(
        32, 11**2 + 13**2 + 5**2 + 3**2, 66 + 91 + 15 + 6, 9, 32, 1, 1
    )
    short = Collator(PAD, 4, pad_to_multiple_of=8, max_positions=14)
    assert short.collate(rows, spans).input_ids.shape == (2, 10)
    assert short.count_positions([7, 9]) == 2 * 14


# --- token limit -----------------------------------------------------------------------------------------------------


COLLATORS = {
    "padded": Collator(PAD),
    "packed": PaddingFreeCollator(PAD),
    "virtual": PaddingFreeCollator(PAD, 4),
    "padded_to_a_multiple": Collator(PAD, pad_to_multiple_of=4),
    "packed_to_a_multiple": PaddingFreeCollator(PAD, 4, pad_to_multiple_of=8),
}


LIMITS = mark_slow(
    [
        (tokens, global_batch, world_size, collator)
        for tokens in (24, 26, 60, 10_000)
        for global_batch, world_size in ((8, 1), (8, 2), (40, 4), (6, 3))
        for collator in COLLATORS
    ],
    keep=lambda point: point[:3] == (60, 8, 2) or (point[3] == "virtual" and point[0] == 24),
    seed=2,
)
"""Every token limit, batch, number of ranks and collator."""


@pytest.mark.parametrize(("tokens", "global_batch", "world_size", "collator_name"), LIMITS)
def test_micro_batches_stay_within_a_token_limit(
    tokens: int, global_batch: int, world_size: int, collator_name: str, dataset: Dataset
) -> None:
    """In every step and on every rank, with the fewest micro-batches; the steps keep their examples."""
    steps, collator = 9, COLLATORS[collator_name]
    limited = [
        batches(dataset, global_batch, None, collator=collator, rank=rank, world_size=world_size).limited_to_tokens(
            tokens, steps
        )
        for rank in range(world_size)
    ]
    one_by_one = [take(batches(dataset, global_batch, 1, collator=collator), steps)][0]
    steps_by_rank = [take(batches_of_rank, steps) for batches_of_rank in limited]
    max_parts, sizes = 0, []
    for step in range(steps):
        ranks = [steps_of_rank[step] for steps_of_rank in steps_by_rank]
        parts = [part for batch in ranks for part in batch.micro_batches]
        assert {len(batch.micro_batches) for batch in ranks} == {limited[0].gradient_accumulation_steps}
        sizes += [collator.count_positions(part.lengths) for part in parts]
        assert sorted(index for part in parts for index in part.example_indices) == sorted(
            index for part in one_by_one[step].micro_batches for index in part.example_indices
        )
        assert {(b.token_counts.real, b.token_counts.labeled, b.model_flop_units) for b in ranks} == {
            (
                one_by_one[step].token_counts.real,
                one_by_one[step].token_counts.labeled,
                one_by_one[step].model_flop_units,
            )
        }
        lengths = sorted(length for part in parts for length in part.lengths)
        max_parts = max(max_parts, math.ceil(count_fewest_parts(lengths, collator, tokens) / world_size))
    assert max(sizes) <= tokens
    assert limited[0].gradient_accumulation_steps == max_parts


def count_fewest_parts(lengths: list[int], collator: Collator, tokens: int) -> int:
    """Return the fewest consecutive groups of at most ``tokens`` positions; each takes as many examples as fit."""
    if not lengths:
        return 0
    fitting = [size for size in range(1, len(lengths) + 1) if collator.count_positions(lengths[:size]) <= tokens]
    return 1 + count_fewest_parts(lengths[max(fitting) :], collator, tokens)


def test_split_evenly_minimizes_the_largest_part() -> None:
    """No way to split seven examples into three consecutive parts has a smaller largest part."""
    lengths = [3, 4, 5, 9, 10, 11, 20]
    for collator in (Collator(PAD), PaddingFreeCollator(PAD)):
        boundaries = [(0, one, two, 7) for one in range(1, 6) for two in range(one + 1, 7)]
        best = min(
            max(collator.count_positions(lengths[start:stop]) for start, stop in itertools.pairwise(boundary))
            for boundary in boundaries
        )
        parts = list(_split_evenly(lengths, collator.count_positions, 3))
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == 7
        assert max(collator.count_positions(lengths[start:stop]) for start, stop in parts) == best


def test_token_limit_below_the_longest_example_is_refused(dataset: Dataset) -> None:
    """The error has the length of the longest example with virtual tokens."""
    with pytest.raises(OutOfRangeError, match="less than the 17 positions of the longest example"):
        batches(dataset, collator=PaddingFreeCollator(PAD, 4)).limited_to_tokens(16, 1)
