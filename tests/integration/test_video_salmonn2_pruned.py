"""video-SALMONN 2 on real mp4s, pruned: the pipeline end to end."""

from pathlib import Path

import fastav

BUNDLE = Path(__file__).parents[1] / "reference" / "video_salmonn2"


def test_pipeline_answers_with_its_evidence():
    pipe = fastav.pipeline(str(BUNDLE), plan="fastav")
    pieces: list[str] = []
    question = "Please describe the video and its audio."
    answer = pipe(BUNDLE / "clip_short.mp4", question, max_new_tokens=12, on_text=pieces.append)
    plain = pipe(BUNDLE / "clip_short.mp4", question, max_new_tokens=12, plan="none")
    assert plain.token_ids == (161, 181, 151, 196, 278, 230, 29, 199, 199, 199, 199, 277)
    assert "".join(pieces).strip() == answer.text
    assert answer.prompt_tokens == {"text": 99, "audio": 63, "video": 140}
    # the first four of seven frames: 20 tokens of picture and 9 of sound each; then a fifth of them goes
    assert [sum(layer.values()) for layer in answer.tokens_per_layer] == [302, 302, 99 + 116, 99 + 93]
    assert answer.tokens_per_layer[2] == {"text": 99, "audio": 36, "video": 80}
    assert plain.flops.ratio == plain.kv_bytes.ratio == 1.0
    assert 0.5 < answer.flops.ratio < 0.9
    assert set(answer.seconds) == {"media", "encode", "prefill", "decode"}
    assert all(seconds > 0 for seconds in answer.seconds.values())


def test_trimming_drops_the_silence_that_fills_a_piece():
    pipe = fastav.pipeline(str(BUNDLE), plan="fastav-trim")
    answer = pipe(BUNDLE / "clip_short.mp4", "What?", max_new_tokens=2)
    assert answer.prompt_tokens["audio"] == 63
    # 6.4 s are 13 tokens of sound; one of them is there twice, for 63 are spread from 60
    assert {layer["audio"] for layer in answer.tokens_per_layer} == {14}
    assert {layer["video"] for layer in answer.tokens_per_layer} == {140}
