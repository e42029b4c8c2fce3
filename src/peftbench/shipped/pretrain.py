"""Pretrain the shipped base model on the docstring corpus, training split only.

    python -m peftbench.shipped.pretrain --out FOLDER

writes the tokenizer, the weights (float16, safetensors) and the model card. Matrices are trained with Muon and all
other parameters with AdamW: on a CPU, tokens are scarce, and Muon needs the fewest of them (Jordan et al. 2024;
learning rates matched to AdamW's as in Moonshot's "Muon is scalable for LLM training", 2025).
"""

from __future__ import annotations

import json
import platform
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftbench.data.docstring_corpus import Corpus, read_corpus
from peftbench.shipped.card import PretrainingRun, render_model_card

EOS_TOKEN = "<|endoftext|>"  # noqa: S105
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 512
WARMUP_STEPS = 100
DECAY_FRACTION = 0.4  # the last 40 % of the steps decay the learning rate linearly to 0; before, it is constant
EVAL_BATCHES = 8


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 4,096 tokens; its one special token ends a text, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=EOS_TOKEN,
        model_max_length=CONTEXT_LENGTH,
    )


def pack_documents(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return the token ids of all documents, each followed by the end token: (rows, CONTEXT_LENGTH + 1)."""
    encoded = tokenizer.backend_tokenizer.encode_batch(documents)
    end = tokenizer.eos_token_id
    flat = torch.tensor([token for document in encoded for token in (*document.ids, end)])
    rows = (len(flat) - 1) // CONTEXT_LENGTH
    # Rows overlap by one token, so that every token is predicted exactly once per epoch.
    return flat[: rows * CONTEXT_LENGTH + 1].unfold(0, CONTEXT_LENGTH + 1, CONTEXT_LENGTH)


def build_model(eos_token_id: int) -> GPT2LMHeadModel:
    """Build a GPT-2 of 4 layers and 256 units: 4.3 million parameters, random weights, no dropout."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT_LENGTH,
        n_embd=256,
        n_layer=4,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for embeddings, biases and norms."""
    inner: list[torch.nn.Parameter] = [p for n, p in model.named_parameters() if p.ndim == 2 and "transformer.h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "transformer.h." in n)]
    return [
        torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def compute_lr_factor(step: int, steps: int) -> float:
    """Return the fraction of the peak learning rate at ``step``: linear warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_FRACTION * steps))


def compute_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy (nats) under bfloat16 autocast; rows (B, CONTEXT_LENGTH + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def compute_held_out_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> float:
    """Return the mean loss on the first rows of the validation packages' documents."""
    with torch.inference_mode():
        return sum(compute_loss(model, part).item() for part in rows.split(16)[:EVAL_BATCHES]) / EVAL_BATCHES


def pretrain(model: GPT2LMHeadModel, rows: torch.Tensor, held_out_rows: torch.Tensor, run: PretrainingRun) -> None:
    """Train in place; append (step, training loss, held-out loss) to ``run.loss_curve``."""
    order = torch.Generator().manual_seed(run.seed)
    batches: list[torch.Tensor] = []
    optimizers = build_optimizers(model, run.learning_rate)
    recent: list[float] = []
    for step in (bar := tqdm(range(run.steps), desc="pretraining", mininterval=10)):
        if not batches:  # a new epoch, reshuffled
            batches = list(torch.randperm(len(rows), generator=order).split(run.batch_rows)[::-1])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate * compute_lr_factor(step, run.steps)
        loss = compute_loss(model, rows[batches.pop()])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == run.steps:
            run.loss_curve.append((step + 1, sum(recent) / len(recent), compute_held_out_loss(model, held_out_rows)))
            bar.set_postfix(loss=f"{run.loss_curve[-1][1]:.3f}", held_out=f"{run.loss_curve[-1][2]:.3f}")
            recent = []


def save_pretrained(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, run: PretrainingRun, save_directory: Path
) -> None:
    """Write weights (float16), tokenizer, loss curve and model card."""
    model.config.use_cache = True
    model.half().save_pretrained(save_directory)
    tokenizer.save_pretrained(save_directory)
    (save_directory / "loss_curve.json").write_text(json.dumps(run.loss_curve) + "\n", encoding="utf-8")
    (save_directory / "README.md").write_text(render_model_card(run), encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Output folder for the model, its tokenizer and its card.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps; 100 take about a minute and a half on 2 cores.")] = 3600,
    batch_rows: Annotated[int, typer.Option(help="Rows of 512 tokens in a batch.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of both optimizers.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of initialization and data order.")] = 0,
) -> None:
    """Pretrain the shipped base model on the docstring corpus, training split only."""
    torch.manual_seed(seed)
    random.seed(seed)
    corpus: Corpus = read_corpus()
    # The corpus is sorted by package; shuffle, so that a row's start does not reveal its package.
    documents = random.sample(corpus.documents["train"], len(corpus.documents["train"]))
    tokenizer = train_tokenizer(documents)
    rows, held_out = pack_documents(documents, tokenizer), pack_documents(corpus.documents["validation"], tokenizer)
    model = build_model(tokenizer.eos_token_id)
    run = PretrainingRun(
        command=f"python -m peftbench.shipped.pretrain --out {out.name} --steps {steps} --batch-rows {batch_rows} "
        f"--learning-rate {learning_rate} --seed {seed}",
        steps=steps,
        batch_rows=batch_rows,
        row_tokens=CONTEXT_LENGTH,
        learning_rate=learning_rate,
        seed=seed,
        parameters=model.num_parameters(),
        documents=len(documents),
        corpus_tokens=rows.shape[0] * CONTEXT_LENGTH,
        corpus_fingerprint=corpus.fingerprint(),
        python=platform.python_version(),
        torch=torch.__version__,
    )
    start = time.perf_counter()
    pretrain(model, rows, held_out, run)
    run.seconds = time.perf_counter() - start
    save_pretrained(model, tokenizer, run, out)


if __name__ == "__main__":
    typer.run(main)
