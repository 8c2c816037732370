"""Train the embedded checkpoint: a small GPT-2 and its tokenizer, from public-domain books.

    python -m ctxprune.recipes.embedded.pretrain --data books-train.jsonl.gz --out DIR --minutes 50

The learning rate follows the clock, so that the run ends when it should; `--resume` goes on from
the last saved state, `--start` begins anew with the weights of an earlier run. The result is
`DIR/checkpoint`, fp16 safetensors and a tokenizer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 1024
WINDOWS_A_STEP = 2
PEAK_LR = 6e-3
END = "<|endoftext|>"


@dataclass
class Progress:
    """How far a run is: steps and seconds of training done."""

    step: int = 0
    seconds: float = 0.0


def read_books(path: Path) -> list[str]:
    """The texts of a .jsonl.gz file of books."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(books: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on an eighth of each book."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((book[: len(book) // 8] for book in books), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        bos_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, books: list[str]) -> Tensor:
    """All books in one row of int32 ids, an end-of-text token after each."""
    ids: list[int] = []
    for book in books:
        # In pieces: one call on a whole book is slow, and a line end is a safe place to cut.
        pieces = [piece + "\n\n" for piece in book.split("\n\n")]
        for row in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.extend(row)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def new_model(seed: int) -> GPT2LMHeadModel:
    """2.4 million parameters: 4 layers, width 192, tied embeddings, no dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=192,
        n_layer=4,
        n_head=6,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def batch(ids: Tensor, step: int, seed: int) -> Tensor:
    """Windows of a step: a new shuffle and a new offset every epoch."""
    windows = len(ids) // CONTEXT - 1
    chosen = []
    for number in range(step * WINDOWS_A_STEP, (step + 1) * WINDOWS_A_STEP):
        epoch, at = divmod(number, windows)
        generator = torch.Generator().manual_seed(seed * 7919 + epoch)
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        place = int(torch.randperm(windows, generator=generator)[at])
        start = offset + place * CONTEXT
        chosen.append(ids[start : start + CONTEXT])
    return torch.stack(chosen).long()


class Optimizers:
    """Muon for the matrices inside the blocks, AdamW for embeddings, gains and biases.

    Muon reaches a given loss in about a third of AdamW's tokens here, and tokens are what a CPU
    has few of.
    """

    def __init__(self, model: GPT2LMHeadModel) -> None:
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.dim() == 2 and ".h." in name]
        others = [p for name, p in named if not (p.dim() == 2 and ".h." in name)]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=PEAK_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, rate: float) -> None:
        """Apply and clear the gradients at a learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The state, by `optimizer/part/parameter/name`."""
        return {
            f"optimizer/{number}/{index}/{key}": value
            for number, part in enumerate(self.parts)
            for index, state in part.state_dict()["state"].items()
            for key, value in state.items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.parts]
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, number, index, key = name.split("/")
                states[int(number)].setdefault(int(index), {})[key] = tensor
        for part, state in zip(self.parts, states, strict=True):
            groups = part.state_dict()["param_groups"]
            part.load_state_dict({"state": state, "param_groups": groups})


def save_state(
    folder: Path, model: GPT2LMHeadModel, optimizers: Optimizers, progress: Progress
) -> None:
    """Write everything that `--resume` needs, replacing the previous state atomically."""
    tensors = {f"parameter/{n}": p.detach().clone() for n, p in model.named_parameters()}
    about = {"step": str(progress.step), "seconds": str(progress.seconds)}
    save_file(tensors | optimizers.tensors(), folder / "state.tmp", metadata=about)
    os.replace(folder / "state.tmp", folder / "state.safetensors")


def load_state(folder: Path, model: GPT2LMHeadModel, optimizers: Optimizers) -> Progress:
    """The inverse of `save_state`."""
    path = folder / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"parameter/{name}"])
    optimizers.restore(tensors)
    return Progress(int(about["step"]), float(about["seconds"]))


def publish(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write `folder/checkpoint` as fp16, replacing an earlier one."""
    temporary, final = folder / "checkpoint.tmp", folder / "checkpoint"
    shutil.rmtree(temporary, ignore_errors=True)
    half = GPT2LMHeadModel(model.config).half()
    half.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    half.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def learning_rate(share: float) -> float:
    """Warm-up over the first fiftieth of the time, then a cosine to a twentieth."""
    if share < 0.02:
        return PEAK_LR * (share + 1e-3) / 0.021
    return PEAK_LR * (0.525 + 0.475 * math.cos(math.pi * (share - 0.02) / 0.98))


def train(
    data: Path, out: Path, minutes: float, seed: int, resume: bool, start: Path | None
) -> None:
    """Train for `minutes` of wall time; writes log.jsonl, the state and the checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    books = read_books(data)
    tokenizer = train_tokenizer(books)
    ids = encode(tokenizer, books)
    print(f"{len(ids)} training tokens", flush=True)
    model = new_model(seed)
    if start is not None:
        model.load_state_dict(
            GPT2LMHeadModel.from_pretrained(start, dtype=torch.float32).state_dict()
        )
    optimizers = Optimizers(model)
    progress = load_state(out, model, optimizers) if resume else Progress()
    fast = torch.compile(model)
    began, saved = time.monotonic() - progress.seconds, time.monotonic()
    while progress.seconds < minutes * 60:
        rate = learning_rate(progress.seconds / (minutes * 60))
        windows = batch(ids, progress.step, seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = fast(windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(rate)
        progress = Progress(progress.step + 1, time.monotonic() - began)
        figures = {
            "step": progress.step,
            "tokens": progress.step * WINDOWS_A_STEP * CONTEXT,
            "seconds": round(progress.seconds),
            "loss": round(float(loss.detach()), 4),
            "lr": rate,
        }
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(figures) + "\n")
        if time.monotonic() - saved > 180 or progress.step == 100:
            save_state(out, model, optimizers, progress)
            publish(out, model, tokenizer)
            saved = time.monotonic()
    save_state(out, model, optimizers, progress)
    publish(out, model, tokenizer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="books, .jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and result")
    parser.add_argument("--minutes", type=float, default=50.0, help="wall time of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="begin with the weights of this checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
