"""VideoLLaMA2 on a real mp4, pruned: the pipeline end to end."""

from pathlib import Path

import fastav

BUNDLE = Path(__file__).parents[1] / "reference" / "videollama2"


def test_the_pipeline_answers_with_its_evidence():
    pipe = fastav.pipeline(str(BUNDLE), plan="fastav")
    pieces: list[str] = []
    answer = pipe(BUNDLE / "clip.mp4", "What moves, and what sound is heard?", max_new_tokens=12, on_text=pieces.append)
    plain = pipe(BUNDLE / "clip.mp4", "What moves, and what sound is heard?", max_new_tokens=12, plan="none")
    assert plain.token_ids == (53, 0, 144, 84, 102, 138, 24, 46, 87, 115, 113, 54)
    assert "".join(pieces).strip() == answer.text
    assert answer.prompt_tokens == {"text": 86, "audio": 1496, "video": 16}
    assert [sum(layer.values()) for layer in answer.tokens_per_layer] == [1598, 1598, 112, 107]
    assert answer.tokens_per_layer[2] == {"text": 86, "audio": 10, "video": 16}
    assert plain.flops.ratio == plain.kv_bytes.ratio == 1.0
    assert 0.5 < answer.flops.ratio < 0.6
    assert answer.kv_bytes.pruned == (1598 * 2 + 112 + 107) * 2 * 2 * 12 * 4
    assert set(answer.seconds) == {"media", "encode", "prefill", "decode"}
    assert all(seconds > 0 for seconds in answer.seconds.values())
    assert answer.peak_bytes is None or answer.peak_bytes > 1_000_000
