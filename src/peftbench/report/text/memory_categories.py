"""Labels of the memory categories, the same in every table and chart."""

MEMORY_CATEGORY_LABELS = {
    "weights": "weights",
    "gathered_weights": "gathered weights",
    "weight_copies": "autocast copies",
    "gradients": "gradients",
    "buckets": "buckets",
    "optimizer_state": "optimizer states",
    "activations": "activations",
    "logits": "logits",
    "temporaries": "temporaries",
    "unattributed": "unattributed",
    "allocator_cache": "allocator cache",
    "cuda_context": "CUDA context",
    "in_use": "in use at the failure",
    "requested": "requested allocation",
    "resident": "resident memory",
}
"""Label of each category, in stacking order."""
