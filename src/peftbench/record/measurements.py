"""What was measured of a run, and where: bytes, seconds, tokens, floating-point operations."""

from __future__ import annotations

from peftbench.common.schema import RecordModel


class Tokens(RecordModel):
    """Tokens trained on, over all ranks: four kinds that must not be mixed."""

    real: int
    padded: int
    labelled: int
    virtual: int


class ParameterCounts(RecordModel):
    """Scalars of the model: all of them once, and the trained ones."""

    total: int
    trainable: int


class Device(RecordModel):
    """Where a run happened."""

    type: str
    name: str
    num_processes: int
    memory_bytes: int | None = None


class Engine(RecordModel):
    """What really ran, compared with the recipe before the first step. micro_batch is None where tokens say it."""

    name: str | None = None
    """single, ddp, zero1 ... fsdp2."""
    distributed_type: str
    """As accelerate names it."""
    model_class: str | None = None
    """Class that the model came to be of."""
    max_grad_norm: float | None = None
    mixed_precision: str
    optimizer_class: str
    micro_batch_size: int | None
    gradient_accumulation_steps: int
    num_threads: int


class Memory(RecordModel):
    """Peak bytes of one phase, or of one part of its steps."""

    allocated_bytes: int | None = None
    """In tensors, on the GPU."""
    reserved_bytes: int | None = None
    """Held by torch's allocator for tensors, on the GPU; what earlier phases left in its cache counts."""
    inactive_split_bytes: int | None = None
    """Most bytes in free pieces of split blocks: for tensors that fit, and not to be given back to the GPU."""
    num_alloc_retries: int | None = None
    """How often the allocator found nothing free, emptied its cache and asked the GPU again."""
    process_bytes: int | None = None
    """Used by this process on the GPU at the end of the phase, by NVML: torch's, and what libraries hold beside."""
    rss_bytes: int | None = None
    """Resident set size of the process."""
    baseline_rss_bytes: int | None = None
    """What of it was resident before anything was loaded."""

    @property
    def fragmentation(self) -> float | None:
        """Share of the reserved peak that tensors never filled at once: fragments, rounding, earlier phases' cache."""
        if self.allocated_bytes is None or not self.reserved_bytes:
            return None
        return 1 - self.allocated_bytes / self.reserved_bytes


class StateBytes(RecordModel):
    """What a method must keep from step to step, by the sizes of its tensors, of one rank."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """One for each trained scalar, in the type it is trained in."""
    optimizer: int
    """States, and under ZeRO the copies in float32 that are stepped."""
    cpu_offloaded: int = 0
    """Of all three, what lies in the CPU's memory beside a GPU, and is counted in none of them."""
    expected_optimizer: int | None = None
    """The optimizer's bytes in closed form, wherever they lie; None where there is none."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer states on the device."""
        return self.weights + self.gradients + self.optimizer


class MemoryBreakdown(RecordModel):
    """Who held the memory when most of it was held, in one step outside of all other figures."""

    step: int
    micro_batch_size: int
    """Of each micro-batch, at most."""
    sequence_length: int
    """Positions of the widest micro-batch, virtual tokens not counted."""
    peak_bytes: int
    """Most bytes in storages at once."""
    bytes_by_category: dict[str, int]
    """At the peak: weights, gathered_weights, weight_copies, gradients, buckets, optimizer_state, activations, logits,
    temporaries; of the first process.
    """
    operation: str
    """Whose result made it the peak."""
    step_part: str | None
    """Of the step: forward, backward or optimizer; under DeepSpeed the last two are one."""


class CountedStep(RecordModel):
    """FLOPs of one real step, over all ranks: counted as torch dispatched them, and in closed form."""

    step: int
    counted_flops: int
    closed_form_flops: int | None
    """None where the model computes something of unknown cost."""


class TokensPerSecond(RecordModel):
    """The four kinds of tokens, per second, over all ranks."""

    real: float
    padded: float
    labelled: float
    virtual: float


class Throughput(RecordModel):
    """Speed of the timed steps, those after warm-up."""

    steps: int
    step_seconds_median: float
    step_seconds_p10: float
    step_seconds_p90: float
    samples_per_second: float
    tokens_per_second: TokensPerSecond
    data_time_fraction: float
    """Part of the time that went to making batches and not to steps."""


class Flops(RecordModel):
    """Floating-point operations of all training steps and ranks: three numbers that must not share a column."""

    model_flops: int | None = None
    """What the method's mathematics needs: real tokens, causal pairs, the head at labels, nothing computed twice."""
    hardware_flops: int | None = None
    """What was computed: padding, all pairs, the head everywhere, and what is computed twice."""
    six_n: int | None = None
    """The convention: six for each parameter outside the embeddings and token, padding included, frozen or not."""
    counted_step: CountedStep | None = None
    """The check of ``executed`` on a warm-up step; None where there was none."""


class Compute(RecordModel):
    """FLOP/s of the timed steps and of what they ran on, over all ranks."""

    model_flops_per_second: float | None = None
    hardware_flops_per_second: float | None = None
    peak_flops_per_second: float | None = None
    """By the maker's data sheet at the precision used; None for a device that is not in the table."""
    matmul_flops_per_second: float | None = None
    """Of a large matrix product, measured on every rank at once when the run ended."""

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: required, of the peak (Chowdhery et al. 2022, appendix B)."""
        return _ratio(self.model_flops_per_second, self.peak_flops_per_second)

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilisation: executed, of the peak."""
        return _ratio(self.hardware_flops_per_second, self.peak_flops_per_second)

    @property
    def matmul_utilization(self) -> float | None:
        """Required, of what a matrix product achieves."""
        return _ratio(self.model_flops_per_second, self.matmul_flops_per_second)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator
