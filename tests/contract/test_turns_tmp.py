import numpy as np, pytest, torch
from dataclasses import replace
from test_families import *
from support.masked import masked_conversation
from transformers import DynamicCache
from fastav.cache_argument import as_argument


def two(family):
    module = family.module
    out = []
    for seed in (0, 1):
        make = np.random.default_rng(seed)
        fps = getattr(module, "FPS", 10)
        audio = family.adapter.supports_audio
        frames = 40
        n = getattr(module, "SOUND", None) or frames * 16000 // fps
        clip = Clip.from_arrays(
            frames=make.integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8),
            fps=fps,
            waveform=make.uniform(-0.5, 0.5, n).astype(np.float32) if audio else None,
            sample_rate=16000 if audio else None,
        )
        out.append(family.adapter.prepare(family.processor, [Request(clip=clip, question="What is heard?")]))
    return out


def join(parts):
    whole = {}
    for name in {k: 1 for p in parts for k in p}:
        values = [p[name] for p in parts if name in p]
        if not isinstance(values[0], torch.Tensor):
            whole[name] = values[0] if not isinstance(values[0], list) else sum(values, [])
            continue
        token = all(tuple(p[name].shape) == tuple(p["input_ids"].shape) for p in parts if name in p)
        whole[name] = torch.cat(values, dim=1 if token else 0)
    return whole


def text(ids, like):
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for n in ("mm_token_type_ids", "token_type_ids"):
        if n in like:
            out[n] = torch.zeros_like(ids)
    return out


@torch.no_grad()
def run(family, attention, plan, prune_it=True):
    model = family.model(attention)
    first, second = two(family)
    decoder = family.adapter.decoder(model)
    answer = []
    ids1 = first.inputs["input_ids"]
    # greedy answer 1: fixed tokens
    a1 = ids1[:, -3:]  # any text tokens
    a2 = second.inputs["input_ids"][:, -3:]
    parts = [dict(first.inputs), text(a1, first.inputs), dict(second.inputs), text(a2, second.inputs)]
    whole = join(parts)
    seen = {}

    def grab(module, args, kwargs):
        seen["p"] = kwargs.get("position_ids")

    h = decoder.register_forward_pre_hook(grab, with_kwargs=True)
    depth = family.depth
    n1 = ids1.shape[1]
    s2 = n1 + 3
    e2 = s2 + second.inputs["input_ids"].shape[1]
    turns = [(0, n1, rules_of(plan, first.layouts[0], depth)), (s2, e2, rules_of(plan, second.layouts[0], depth))]
    expected = masked_conversation(model, decoder.layers, whole, turns)
    h.remove()
    pos = seen["p"]
    if pos is None:
        pos = torch.arange(whole["input_ids"].shape[1])[None]
    cache = DynamicCache(config=decoder.config)
    from contextlib import nullcontext

    at = 0
    logits = []
    pruning = prune(model, plan, adapter=family.adapter)
    with pruning:
        for i, p in enumerate(parts):
            n = p["input_ids"].shape[1]
            inputs = {
                **p,
                "attention_mask": torch.ones(1, at + n, dtype=torch.long),
                "position_ids": pos[..., at : at + n],
            }
            if "bidirectional" in family.module.__name__:
                inputs["mm_token_type_ids"] = whole["mm_token_type_ids"][:, : at + n]
            with pruning.turn([(first, second)[i // 2].layouts[0]]) if i % 2 == 0 else nullcontext():
                out = model(**inputs, **as_argument(cache)).logits[0]
            logits.append(out if i % 2 else out[-1:])
            at += n
    found = torch.cat(logits)
    places = [n1 - 1, *range(n1, s2), e2 - 1, *range(e2, e2 + 3)]
    return found, expected[places]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("which", ["none", "plan"])
def test_it(family, attention, which):
    plan = NONE if which == "none" else family.plan
    found, expected = run(family, attention, plan)
    d = (found - expected).abs().amax(1)
    print(family.module.__name__, attention, which, d.tolist(), expected.abs().max())
    assert d.max() < 1e-4
