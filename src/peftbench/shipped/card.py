"""Render the shipped base model's card from what the pretraining run recorded."""

from __future__ import annotations

from dataclasses import dataclass, field

from tabulate import tabulate


@dataclass
class PretrainingRun:
    """Settings and results of a pretraining run."""

    command: str
    steps: int
    batch_rows: int
    row_tokens: int
    learning_rate: float
    seed: int
    parameters: int
    documents: int
    corpus_tokens: int
    corpus_fingerprint: str
    python: str
    torch: str
    seconds: float = 0.0
    loss_curve: list[tuple[int, float, float]] = field(default_factory=list)


_CARD_TEMPLATE = """---
license: apache-2.0
language: en
tags: [gpt2, docstrings]
---
# The base model shipped with peftbench

A GPT-2 of 4 layers and 256 units ({parameters:,} parameters, float16) with its own byte-level BPE of 4,096 pieces. It
lets fine-tuning methods be compared without the Hub, a GPU or a download; it has no other use.

- **Data**: {documents:,} distinct docstrings of the Python standard library and of peftbench's run-time dependencies,
  {corpus_tokens:,} tokens; the held-out packages (networkx, nltk) were not used. The text belongs to its authors and is
  under their packages' open-source licenses. Fingerprint of the corpus' pairs: `{corpus_fingerprint}`.
- **Training**: {steps:,} steps of {batch_rows} x {row_tokens} tokens ({tokens:,} tokens, {epochs:.1f} epochs) in
  {minutes:.0f} minutes on CPU; Muon for the blocks' matrices, AdamW for the rest, peak learning rate
  {learning_rate}, seed {seed}; Python {python}, torch {torch}.
- **Command**: `{command}`
- **Limits**: it has learned the form of docstrings and little else. Do not use it to write docstrings.

## Loss

Mean next-token cross-entropy in nats: over the training rows since the previous line, and on documents of the
validation package. All points are in `loss_curve.json`.

{table}
"""


def render_model_card(run: PretrainingRun) -> str:
    """Return the card in Markdown, with about a dozen points of the loss curve."""
    stride = max(1, len(run.loss_curve) // 12)
    points = run.loss_curve[stride - 1 :: stride]
    if run.loss_curve and points[-1] != run.loss_curve[-1]:
        points.append(run.loss_curve[-1])
    table = tabulate(points, headers=["step", "training loss", "held-out loss"], tablefmt="github", floatfmt=".3f")
    tokens = run.steps * run.batch_rows * run.row_tokens
    return _CARD_TEMPLATE.format(
        **vars(run), tokens=tokens, epochs=tokens / run.corpus_tokens, minutes=run.seconds / 60, table=table
    )
