"""What autocast casts on each kind of device, by the name under which torch's Python functions are called.

Source: torch's lists (aten/src/ATen/autocast_mode.h for CUDA, autocast_mode.cpp for the CPU), as of torch 2.13, and its
documentation "Autocast Op Reference".
"""

from __future__ import annotations

_MATMUL_OPS = frozenset(
    {
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "addbmm",
        "baddbmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "conv_tbc",
        "prelu",
        "linalg_vecdot",
        "__matmul__",
        "__rmatmul__",
        "scaled_dot_product_attention",
    }
)
LOWER_PRECISION_FP = {
    "cuda": _MATMUL_OPS | {"mv", "addmv", "addr", "einsum", "chain_matmul", "linalg_multi_dot"},
    "cpu": _MATMUL_OPS,
}
"""Computed in the lower precision."""
_LOSS_OPS = frozenset(
    {
        "nll_loss",
        "cosine_embedding_loss",
        "poisson_nll_loss",
        "hinge_embedding_loss",
        "kl_div",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "mse_loss",
        "margin_ranking_loss",
        "multilabel_margin_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
        "multi_margin_loss",
        "binary_cross_entropy_with_logits",
    }
)
FP32 = {
    "cuda": _LOSS_OPS
    | {
        "acos",
        "asin",
        "cosh",
        "erfinv",
        "exp",
        "expm1",
        "log",
        "log10",
        "log2",
        "log1p",
        "reciprocal",
        "rsqrt",
        "sinh",
        "tan",
        "pow",
        "__pow__",
        "__rpow__",
        "softplus",
        "layer_norm",
        "group_norm",
        "cosine_similarity",
        "dist",
        "cdist",
        "pdist",
        "renorm",
        "logsumexp",
        "rms_norm",
    },
    "cpu": _LOSS_OPS | {"prod", "quantile", "cdist", "trace", "cross_entropy", "binary_cross_entropy"},
}
"""Computed in float32, inputs cast."""
FP32_SET_OPT_DTYPE = {
    "cuda": frozenset({"softmax", "log_softmax", "cumsum", "cumprod", "sum", "prod", "norm"}),
    "cpu": frozenset[str](),
}
"""Computed in float32 with ``dtype=float32``, so that no cast copy of the input is kept."""
PROMOTE = {
    "cuda": frozenset({"cat", "stack", "addcdiv", "addcmul", "cross", "dot", "tensordot", "scatter_add", "index_put"}),
    "cpu": frozenset({"cat", "stack", "index_copy"}),
}
"""Computed in the widest type among the inputs."""
