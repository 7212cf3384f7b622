"""The cost of attention rollout at real sizes: `python -m benchmarks.rollout`.

One layer of a 7B decoder (28 heads, 4 of them with keys and values, 128 channels each), causal, with random queries and
keys. Rows are those that a calibration needs from the first layer: of three queries and 28 layers. Dense is the
definition: the layer's whole map, mean over heads, times the rollout so far.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastav.bench import report
from fastav.bench.measure import PeakGrowth, Quartiles, timed
from fastav.pruning.attention import weighted_attention

HEADS, KV_HEADS, FEATURES, LAYERS, STARTS = 28, 4, 128, 28, 3
HIDDEN, INTERMEDIATE = 3584, 18_944


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One way to compute it.  seconds: of one layer. peak_bytes: beside queries and keys; None if not reported."""

    tokens: int
    what: str
    seconds: Quartiles
    peak_bytes: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write `DIR/rollout-<device>.json` if asked."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", default="2048,4096,8192", help="lengths of the prompt (default: %(default)s)")
    parser.add_argument(
        "--dense-up-to", type=int, default=4096, help="longest prompt with whole maps (default: %(default)s)"
    )
    parser.add_argument(
        "--layer-up-to",
        type=int,
        default=2048,
        help="longest prompt with a layer's prefill, to compare (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--commit", help="name of the commit, where git cannot tell")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    result = report.circumstances(arguments, device, options.commit, "benchmarks.rollout")
    result["costs"] = []
    print(f"{'tokens':>8}  {'what':<24}{'seconds a layer':>26}{'peak MB':>10}")
    for tokens in map(int, options.tokens.split(",")):
        for cost in _costs(tokens, device, options):
            result["costs"].append(asdict(cost))
            peak = report.megabytes(cost.peak_bytes, ".0f")
            print(f"{tokens:>8}  {cost.what:<24}{report.cell(asdict(cost.seconds)):>26}{peak:>10}", flush=True)
            if options.out:
                report.write(result, options.out / f"rollout-{device.type}.json")
    return 0


def _costs(tokens: int, device: torch.device, options: argparse.Namespace) -> Iterator[Cost]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    make = torch.Generator(device).manual_seed(0)
    query = torch.randn(1, HEADS, tokens, FEATURES, generator=make, device=device, dtype=dtype)
    key = torch.randn(1, KV_HEADS, tokens, FEATURES, generator=make, device=device, dtype=dtype)
    scaling = FEATURES**-0.5
    weights = torch.rand(1, STARTS * LAYERS, tokens, generator=make, device=device)
    runs: dict[str, Callable[[], Any]] = {
        "rows, one": lambda: weighted_attention(weights[:, :1], query, key, None, None, scaling),
        f"rows, {STARTS * LAYERS}": lambda: weighted_attention(weights, query, key, None, None, scaling),
    }
    if tokens <= options.dense_up_to:
        runs["dense"] = lambda: dense(query, key, scaling, torch.full((tokens, tokens), 1 / tokens, device=device))
    if tokens <= options.layer_up_to:
        runs["prefill of the layer"] = _layer(tokens, device, dtype)
    for what, run in runs.items():
        seconds, peaks = [], []
        for _ in range(options.rounds):
            gc.collect()
            peak = PeakGrowth(device)
            seconds.append(timed(device, run)[0])
            peaks.append(peak.bytes())
        peak_bytes = None if None in peaks else max(peaks)
        yield Cost(tokens=tokens, what=what, seconds=Quartiles.of(seconds), peak_bytes=peak_bytes)


@torch.inference_mode()
def dense(query: Tensor, key: Tensor, scaling: float, before: Tensor) -> Tensor:
    """The rollout by its definition: `A~ R` with whole maps, where R is the rollout of the layers before."""
    tokens = query.shape[2]
    scores = (query.float() * scaling) @ key.float().repeat_interleave(HEADS // KV_HEADS, 1).transpose(-1, -2)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
    attention = scores.masked_fill_(hidden, -torch.inf).softmax(-1).mean((0, 1))
    identity = torch.eye(tokens, device=query.device)
    return (0.5 * attention + 0.5 * identity) @ before


def _layer(tokens: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """A prefill of one layer of this shape, with random weights."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        layer, rotary = Qwen2DecoderLayer(config, 0).to(dtype).eval(), Qwen2RotaryEmbedding(config)
        hidden = torch.randn(1, tokens, HIDDEN, dtype=dtype)
        position = rotary(hidden, torch.arange(tokens)[None])

    @torch.inference_mode()
    def run() -> Any:
        return layer(hidden, position_embeddings=position, attention_mask=None)

    return run


if __name__ == "__main__":
    sys.exit(main())
