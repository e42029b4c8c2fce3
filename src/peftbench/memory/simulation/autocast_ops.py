"""The cast policy of each operation under autocast, by device type and Python function name.

The names are torch's CastPolicy values: lower_precision_fp, fp32, fp32_set_opt_dtype, promote. Source: torch's lists
(aten/src/ATen/autocast_mode.h for CUDA, autocast_mode.cpp for the CPU), as of torch 2.13, and its documentation
"Autocast Op Reference".
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
"""Inputs are cast to the autocast dtype."""
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
"""Inputs are cast to float32."""
FP32_SET_OPT_DTYPE = {
    "cuda": frozenset({"softmax", "log_softmax", "cumsum", "cumprod", "sum", "prod", "norm"}),
    "cpu": frozenset[str](),
}
"""Called with ``dtype=float32``; no cast copy of the input is saved."""
PROMOTE = {
    "cuda": frozenset({"cat", "stack", "addcdiv", "addcmul", "cross", "dot", "tensordot", "scatter_add", "index_put"}),
    "cpu": frozenset({"cat", "stack", "index_copy"}),
}
"""Inputs are cast to the widest dtype among them."""
