"""The figures of docs/results/vllm.md: vLLM dense and evicting, one after the other, in one run.

python tests/vllm/measure.py FOLDER TEXT.jsonl.gz equality decoding clients
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import engines

from ctxprune.pruner.checkpoints.checkpoint import load_tokenizer
from ctxprune.pruner.data import read_texts, spread, windows

LENGTH = 4096
# Tokens of a block of vLLM's own cache on a CPU; one block, or page, is no request's.
BLOCK = 128


def equality(folder: Path, texts: list[list[int]]) -> dict[str, Any]:
    """Eight prompts of 1,024 in float32, 32 tokens each: how many are those of our `generate`."""
    asked = [text[:1024] for text in texts[:8]]
    expected = engines.expected(folder, asked, 32)
    with engines.Serving(folder, max_model_len=2048) as server:
        found = server.write(asked, 32)
    pairs = zip(sum(found, []), sum(expected, []), strict=True)
    return {"equal": sum(a == b for a, b in pairs), "of": 32 * len(asked)}


def decoding(folder: Path, texts: list[list[int]]) -> dict[str, Any]:
    """Eight prompts of 4,096, 128 tokens each."""
    return both(folder, texts[:8], 128, 2**30)


def clients(folder: Path, texts: list[list[int]]) -> dict[str, Any]:
    """Sixteen prompts of 1,024 at once, 512 tokens each, in the memory of four dense requests."""
    config = json.loads((folder / "config.json").read_text())
    token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    asked = [text[:1024] for text in texts]
    return both(folder, asked, 512, (4 * (1024 + 512) + BLOCK) * token)


def both(folder: Path, asked: list[list[int]], tokens: int, memory: int) -> dict[str, Any]:
    """Dense, and evicting, in bfloat16 and so many bytes.

    The folder's sparsity is met on texts as long as those of tuning, or as long as these.
    """
    longest = len(asked[0]) + tokens
    options: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_memory_bytes": memory}
    options |= {"max_model_len": longest, "max_num_batched_tokens": 2048}
    evicting = {"architectures": [engines.ARCHITECTURE]}
    modes: dict[str, dict[str, Any]] = {
        "dense": {},
        "evicting": evicting,
        "evicting, by this length": {**evicting, "ctxprune": {"context": longest}},
    }
    found: dict[str, Any] = {}
    for name, overrides in modes.items():
        with engines.Serving(folder, hf_overrides=overrides, **options) as server:
            blocks = server.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            each = 1 if overrides else -(-longest // BLOCK)
            found[name] = {
                "kv_bytes": memory // blocks * each,
                "requests": (blocks - 1) // each,
                **timed(server, asked, tokens),
            }
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def timed(server: engines.Serving, asked: list[list[int]], tokens: int) -> dict[str, float]:
    """Seconds until all prompts are read; tokens a second from then on, and in all."""
    engine = server.llm.llm_engine
    for number, ids in enumerate(asked):
        engine.add_request(str(number), {"prompt_token_ids": ids}, engines.greedy(tokens))
    written, before = [0] * len(asked), 0
    begin = read = time.perf_counter()
    while engine.has_unfinished_requests():
        for each in engine.step():
            written[int(each.request_id)] = len(each.outputs[0].token_ids)
        if not before and all(written):
            read, before = time.perf_counter(), sum(written)
    end = time.perf_counter()
    return {
        "seconds_read": round(read - begin, 2),
        "decoded_per_second": round((sum(written) - before) / (end - read), 1),
        "written_per_second": round(sum(written) / (end - begin), 1),
    }


def main() -> None:
    folder, source, *names = Path(sys.argv[1]), *sys.argv[2:]
    text = windows(load_tokenizer(folder), read_texts(str(source)), LENGTH)
    texts = spread(text, 16).tolist()
    for name in names:
        figure = {"equality": equality, "decoding": decoding, "clients": clients}[str(name)]
        print(json.dumps({name: figure(folder, texts)}), flush=True)


if __name__ == "__main__":
    main()
