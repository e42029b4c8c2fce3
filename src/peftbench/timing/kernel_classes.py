"""Classes of operations that move bytes at a similar rate; calibration measures one operation of each class."""

from __future__ import annotations

from typing import Literal, get_args

KernelClass = Literal[
    "copy",
    "arithmetic",
    "fill",
    "activation",
    "activation_backward",
    "normalization",
    "normalization_backward",
    "softmax",
    "softmax_backward",
    "reduction",
    "gather",
    "scatter",
    "random",
    "adamw",
    "adamw8bit",
]
KERNEL_CLASSES: tuple[KernelClass, ...] = get_args(KernelClass)

_CLASS_BY_NAME: dict[str, KernelClass] = {
    **dict.fromkeys(("_to_copy", "clone", "copy_", "cat", "stack", "_foreach_copy_", "constant_pad_nd"), "copy"),
    **dict.fromkeys(("fill_", "zero_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full"), "fill"),
    **dict.fromkeys(("gelu", "silu", "tanh", "sigmoid", "exp", "pow", "log", "erf", "softplus"), "activation"),
    **dict.fromkeys(
        ("gelu_backward", "silu_backward", "tanh_backward", "sigmoid_backward"),
        "activation_backward",
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), "normalization"),
    **dict.fromkeys(("native_layer_norm_backward", "_fused_rms_norm_backward"), "normalization_backward"),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "logsumexp"), "softmax"),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), "softmax_backward"),
    **dict.fromkeys(
        ("sum", "mean", "amax", "linalg_vector_norm", "_foreach_norm", "argmax", "nll_loss_forward"), "reduction"
    ),
    **dict.fromkeys(("embedding", "index_select", "index", "gather"), "gather"),
    **dict.fromkeys(
        ("embedding_dense_backward", "index_add", "index_add_", "index_put_", "_index_put_impl_", "scatter_add_"),
        "scatter",
    ),
    **dict.fromkeys(("native_dropout", "bernoulli_", "uniform_", "normal_", "exponential_"), "random"),
    **dict.fromkeys(("_fused_adamw_", "_fused_adam_", "optimizer_update_32bit"), "adamw"),
    **dict.fromkeys(("optimizer_update_8bit_blockwise", "quantize_blockwise", "dequantize_blockwise"), "adamw8bit"),
}


def classify_kernel(name: str) -> KernelClass:
    """Return the class of torch's operation ``name``; arithmetic if it is in no other."""
    return _CLASS_BY_NAME.get(name, "arithmetic")
