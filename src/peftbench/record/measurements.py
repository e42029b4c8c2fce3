"""Measurements of a run: bytes, seconds, tokens, floating-point operations, and the device."""

from __future__ import annotations

from peftbench.common.schema import RecordModel


class Tokens(RecordModel):
    """Tokens trained on, summed over ranks: four kinds that must not be mixed."""

    real: int
    padded: int
    labeled: int
    virtual: int


class ParameterCounts(RecordModel):
    """Number of scalars in the model (a tied tensor once) and of trainable ones."""

    total: int
    trainable: int
    added_frozen: int | None = None
    """Scalars that the method added and does not train, buffers included; None if unknown."""


class SavedModel(RecordModel):
    """The saved model of a run."""

    weight_bytes: int
    """Size of its weight files."""
    merges_into_base: bool | None = None
    """True if it is an adapter that can be merged into the base model; None for a whole model."""
    needs_linear_layers: bool = False
    """True if the adapter fits the base model only after its Conv1D layers are replaced by Linear layers."""


class Device(RecordModel):
    """Device of a run."""

    type: str
    name: str
    num_processes: int
    memory_bytes: int | None = None


class Engine(RecordModel):
    """Effective engine settings, verified against the recipe before the first step.

    ``micro_batch_size`` is None if micro-batches are limited by tokens.
    """

    name: str | None = None
    """single, ddp, zero1 ... fsdp2."""
    distributed_type: str
    """Accelerate's name of it."""
    model_class: str | None = None
    """Class of the prepared model."""
    max_grad_norm: float | None = None
    mixed_precision: str
    optimizer_class: str
    micro_batch_size: int | None
    gradient_accumulation_steps: int
    num_threads: int


class Memory(RecordModel):
    """Peak bytes of one phase, or of one part of its steps."""

    allocated_bytes: int | None = None
    """Bytes in tensors, on the GPU."""
    reserved_bytes: int | None = None
    """Bytes reserved by the CUDA caching allocator, blocks cached in earlier phases included."""
    inactive_split_bytes: int | None = None
    """Peak bytes in free parts of split blocks, which the allocator cannot release to the GPU."""
    num_alloc_retries: int | None = None
    """Number of failed cudaMalloc calls after which the allocator flushed its cache and retried."""
    process_bytes: int | None = None
    """GPU memory of the process at the end of the phase (NVML): torch, CUDA context and libraries."""
    rss_bytes: int | None = None
    """Peak resident set size of the process."""
    baseline_rss_bytes: int | None = None
    """Resident set size before anything was loaded."""

    @property
    def fragmentation(self) -> float | None:
        """Fraction of peak reserved bytes not in tensors at the peak: fragments, rounding, cached blocks."""
        if self.allocated_bytes is None or not self.reserved_bytes:
            return None
        return 1 - self.allocated_bytes / self.reserved_bytes


class StateBytes(RecordModel):
    """Bytes of one rank that persist between steps, from tensor sizes."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """One scalar per trainable scalar, in its dtype."""
    optimizer: int
    """Optimizer states, and ZeRO's float32 master weights."""
    cpu_offloaded: int = 0
    """Bytes offloaded from the GPU to CPU memory; not included in the other three."""
    expected_optimizer: int | None = None
    """Optimizer bytes in closed form, on any device; None if no formula exists."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer states on the device."""
        return self.weights + self.gradients + self.optimizer


class MemoryBreakdown(RecordModel):
    """Peak memory by category, measured in one untimed step."""

    step: int
    micro_batch_size: int
    """Rows of the largest micro-batch."""
    sequence_length: int
    """Positions of the longest row, virtual tokens excluded."""
    peak_bytes: int
    """Peak bytes in tensor storages."""
    bytes_by_category: dict[str, int]
    """At the peak: weights, gathered_weights, weight_copies, gradients, buckets, optimizer_state, activations, logits,
    temporaries; of the first process.
    """
    operation: str
    """Operation whose result reached the peak."""
    step_part: str | None
    """Part of the step: forward, backward or optimizer; DeepSpeed merges the last two."""


class CountedStep(RecordModel):
    """FLOPs of one step, summed over ranks: counted from dispatched operations, and in closed form."""

    step: int
    counted_flops: int
    closed_form_flops: int | None
    """None if the cost of an operation of the model is unknown."""


class TokensPerSecond(RecordModel):
    """The four kinds of tokens per second, summed over ranks."""

    real: float
    padded: float
    labeled: float
    virtual: float


class Throughput(RecordModel):
    """Speed of the timed steps."""

    steps: int
    step_seconds_median: float
    step_seconds_p10: float
    step_seconds_p90: float
    samples_per_second: float
    tokens_per_second: TokensPerSecond
    data_time_fraction: float
    """Fraction of the time spent on building batches."""


class Flops(RecordModel):
    """Floating-point operations of all training steps and ranks: three numbers that must not share a column."""

    model_flops: int | None = None
    """FLOPs that the method requires: real tokens, causal pairs, the head at labels, no recomputation."""
    hardware_flops: int | None = None
    """FLOPs computed: padding, all pairs, the head at all computed positions, recomputation."""
    six_n: int | None = None
    """The 6N convention: 6 per token (padding included) and parameter (frozen or not) outside the embeddings."""
    counted_step: CountedStep | None = None
    """Check of ``hardware_flops`` on an untimed step; None if not done."""


class Compute(RecordModel):
    """FLOP/s of the timed steps and of the device, summed over ranks."""

    model_flops_per_second: float | None = None
    hardware_flops_per_second: float | None = None
    peak_flops_per_second: float | None = None
    """Data sheet value at the precision of the run; None for an unknown device."""
    matmul_flops_per_second: float | None = None
    """FLOP/s of a large matrix product, measured on all ranks at once at the end of the run."""

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: model FLOP/s over peak (Chowdhery et al. 2022, appendix B)."""
        return _ratio(self.model_flops_per_second, self.peak_flops_per_second)

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilization: hardware FLOP/s over peak."""
        return _ratio(self.hardware_flops_per_second, self.peak_flops_per_second)

    @property
    def matmul_utilization(self) -> float | None:
        """Model FLOP/s over the FLOP/s of a large matrix product."""
        return _ratio(self.model_flops_per_second, self.matmul_flops_per_second)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


class SplitOverlap(RecordModel):
    """Evaluated examples that are also training examples."""

    texts: int
    """Examples whose text is in the training split."""
    texts_with_reference: int
    """Those of them with the same reference."""
    ids: int = 0
    """Examples whose id is in the training split; 0 if ids are row numbers."""
    same_file: bool = False
    """True if both splits were read from one file."""
