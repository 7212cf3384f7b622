"""The report of a calibration: what it says, that it says it safely, and that it needs nothing else."""

import importlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fastav.budgets import Before, Frames, Share, Tokens
from fastav.calibrate import AnswerPair, Evidence, Preview, Record, Store
from fastav.errors import CalibrationError, InstallationError
from fastav.layout import Layout, Modality
from fastav.plan import Keep, Plan, Step
from fastav.presets import fastav
from fastav.report import figures, formatting, page
from fastav.report.content import (
    audio_segments,
    binned,
    dropped_attention,
    frame_tokens,
    modality_cuts,
    read,
    remaining_tokens,
    tracks,
)
from fastav.report.example import example_inspection
from fastav.trace import Trace

DEPTH, START = 4, 2
VOID = {"meta", "br", "img"}
AUDIO, VIDEO, TEXT = Modality.AUDIO, Modality.VIDEO, Modality.TEXT
PLAN = fastav(Keep(audio=Tokens(0), video=Tokens(5)), start=START, name="calibrated")


def layout_of(video: int = 12, audio: int = 8, text: int = 3, *, seconds: bool = True) -> Layout:
    """A letter, frames of 4 tokens a second, 4 tokens of audio a second, text."""
    known: Any = (lambda n, rate: np.arange(n) // rate * 1.0) if seconds else (lambda n, rate: None)
    return Layout.join(
        [
            Layout.of(TEXT, 1),
            Layout.of(VIDEO, video, second=known(video, 4), frame=np.arange(video) // 4),
            Layout.of(AUDIO, audio, second=None if not seconds else np.arange(audio) / 4),
            Layout.of(TEXT, text),
        ]
    )


def trace_of(layout: Layout, seed: int = 0, selections: tuple[tuple[int, np.ndarray], ...] = ()) -> Trace:
    weights = np.random.default_rng(seed).exponential(size=(2, 3, DEPTH, len(layout))).astype(np.float32)
    weights /= weights.sum(-1, keepdims=True)
    return Trace(
        layout=layout, attention=weights[0], rollout=weights[1], selections=selections, seconds={"prefill": 1.0}
    )


def preview_of(layout: Layout) -> Preview:
    moments = np.unique(layout.second[(layout.modality == VIDEO) & np.isfinite(layout.second)]).astype(float)
    frames = np.full((len(moments), 9, 16, 3), 128, np.uint8) if len(moments) else np.zeros((0, 1, 1, 3), np.uint8)
    heard = layout.count(AUDIO) > 0
    peaks = np.stack([-np.ones(80), np.ones(80)]).astype(np.float32) if heard else np.zeros((2, 0), np.float32)
    return Preview(frames=frames, moments=moments, peaks=peaks, duration=4.0)


def answer_of(text: str, plan: Plan, layout: Layout) -> dict[str, Any]:
    layers = [{m.label: there.get(frozenset({m}), 0) for m in Modality} for there in plan.layers(layout, DEPTH)]
    ratio = sum(plan.tokens(layout, DEPTH)) / len(layout) / DEPTH
    return {"text": text, "tokens_per_layer": layers, "flops": {"ratio": ratio}, "kv_bytes": {"ratio": ratio}}


def made(
    folder: Path,
    layouts: Sequence[Layout],
    *,
    question: str = "what is it?",
    answers: tuple[str, str] = ("a bell", "a bell"),
    plan: Plan = PLAN,
    failures: Sequence[tuple[str, str]] = (),
    comparison: dict[str, Any] | None = None,
) -> Path:
    """A finished calibration of prompts with these layouts, the first of which is shown.

    comparison: that of its result; None as in folders of earlier versions.
    """
    store = Store(folder)
    head = {"layers": DEPTH, "hidden": 8, "alpha": 0.5, "dtype": "float32", "device": "cpu"}
    store.begin({"model": "tiny", "source": "tiny", **head})
    for number, layout in enumerate(layouts):
        trace = trace_of(layout, number)
        store.save(f"prompt{number}", Record(clip="a.mp4", question=question, trace=trace, preview=preview_of(layout)))
    first = layouts[0]
    stays = np.flatnonzero((first.modality == TEXT) | (np.arange(len(first)) <= 5))
    shown = trace_of(first, 0, ((START, stays),))
    store.save("shown", Record(clip="a.mp4", question=question, trace=shown, preview=preview_of(first)))
    origin = {
        "model": "tiny",
        "layers": DEPTH,
        "hidden": 8,
        "clips": 1,
        "commit": "abc1234",
        "machine": {"cpu": "A processor", "cores": 2},
        "versions": {"python": "3.11"},
        "date": "2026-01-02T03:04:05+00:00",
        "criterion": {"budget": 0.6, "tokens": None, "start": "middle", "rule": "auto", "drop": 0.2},
        "rule": "first",
    }
    small = Plan(plan.steps[:1], plan.name)  # whose counts by modality are known
    store.finish(
        {
            "plan": Plan(plan.steps, plan.name, origin).to_json(),
            "rule": "first",
            "start": START,
            "held": 0.7,
            "flops": 0.61,
            "kv": 0.62,
            "shown": "shown",
            "tokens": 5.0,
            "prompts": [f"prompt{number}" for number in range(len(layouts))],
            "failures": [{"clip": f"/clips/{clip}", "reason": reason} for clip, reason in failures],
            "answers": [answer_of(answers[0], Plan(), first), answer_of(answers[1], small, first)],
        }
        | ({} if comparison is None else {"comparison": comparison})
    )
    return folder


class Strict(HTMLParser):
    """Opens and closes every element in order; keeps the text, and what elements refer to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.formatting: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.formatting.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.formatting).split())

    def values(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(attribute)) is not None]


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """Two prompts of different length, a question and answers that are hostile, a failure that came twice."""
    return page(
        made(
            tmp_path_factory.mktemp("calibration") / "cal",
            [layout_of(), layout_of(16, 12, 5)],
            question="<script>alert('q')</script> & more?",
            answers=("<b>a bell</b>", "a drum"),
            failures=[("broken.mp4", "no <media> file"), ("broken.mp4", "no <media> file")],
        )
    )


@pytest.fixture(scope="module")
def parsed(html) -> Strict:
    return Strict(html)


def test_it_is_one_file_that_needs_nothing_else(html, parsed):
    assert html.startswith("<!DOCTYPE html>")
    assert "http" not in html
    assert "@import" not in html
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "link" not in {tag for tag, _ in parsed.tags}
    references = parsed.values("src") + parsed.values("href") + re.findall(r"url\(([^)]*)\)", html)
    assert references
    assert all(re.match(r"#|data:image/(png|jpeg);base64,", reference) for reference in references)


def test_every_reference_has_its_own_target(html, parsed):
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    used = [value[1:] for value in parsed.values("href") if value.startswith("#")]
    used += re.findall(r"url\(#([^)]+)\)", html) + parsed.values("aria-labelledby")
    assert set(used) <= set(ids)


def test_drawings_are_svg_for_wide_and_narrow_screens_each_told_in_words(html, parsed):
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    kinds = [ElementTree.fromstring(drawing).attrib["class"] for drawing in drawings]
    assert kinds == ["wide", "narrow"] * 6
    told = [attributes["aria-label"] for _, attributes in parsed.tags if attributes.get("role") == "img"]
    assert len(told) == 6
    assert all(told)
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).attrib["viewBox"].startswith("0 0 ")
        assert "DejaVu" not in drawing
    assert all(attributes["alt"] for tag, attributes in parsed.tags if tag == "img")


def test_it_says_what_the_plan_does_and_what_was_found(parsed):
    text = parsed.text
    for said in (
        "Entering layer 2 of 4, the first 5 video tokens stay, and no audio tokens.",
        "Entering layer 3 of 4, 20 % of the audio and video tokens that are left go",
        "61.0 % prefill FLOPs",
        "5 tokens stay of 24 audio and video tokens",
        "70.0 % of the rollout stays",
        "2 prompts on 1 clip",
        "60 % of the FLOPs",
        "alpha = 0.5",
        "abc1234",
        "A processor, 2 cores; weights in float32 on cpu",
        "python 3.11",
        "2 January 2026, 03:04 UTC",
        "What it sees: 5 of 12 tokens stay",
        "What it hears: 0 of 8 tokens stay",
        "The cut drops the hatched part.",
        "The answers differ.",
        "broken.mp4 2 no <media> file",
    ):
        assert said in text


def test_words_of_others_are_escaped(html, parsed):
    assert "<script>" not in html
    assert "<b>a bell" not in html
    assert "<script>alert('q')</script> & more?" in parsed.text
    assert "<b>a bell</b>" in parsed.text


def test_frames_are_as_pale_as_their_tokens_are_gone(parsed):
    gone = [float(style.removeprefix("--gone: ")) for style in parsed.values("style") if "--gone" in style]
    assert gone == [0.0, 0.75, 1.0]  # of 12 tokens, 4 a frame, 5 stay
    assert "0 s 4 of 4" in parsed.text
    assert "1 s 1 of 4" in parsed.text


def test_video_alone_whose_seconds_are_unknown(tmp_path):
    layout = layout_of(12, 0, seconds=False)
    html = page(made(tmp_path / "cal", [layout, layout], plan=fastav(Keep(video=Tokens(5)), start=START)))
    text = Strict(html).text
    assert "By second of the clip: unknown" in text
    assert "It is unknown which frame a token shows" in text
    assert "What it hears" not in text
    assert len(re.findall("<svg", html)) == 2 * 4  # neither seconds nor a waveform


def test_20000_tokens_of_audio_alone_stay_small_and_quick(tmp_path):
    folder = made(tmp_path / "cal", [layout_of(0, 19_996)], plan=fastav(Keep(audio=Share(0.5)), start=START))
    begun = time.process_time()
    html = page(folder)
    assert time.process_time() - begun < 20
    assert len(html) < 1_000_000
    text = Strict(html).text
    assert "over about 33 neighbours" in text
    assert "What it sees" not in text
    assert "What it hears" in text
    assert "only one prompt" in text
    assert "Prompts that failed" not in text
    assert "The answers are the same." in text


def test_neighbours_become_means():
    values = np.arange(12.0).reshape(2, 6)
    assert binned(values, 3).tolist() == [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]]
    assert binned(values, 600).tolist() == values.tolist()
    long = np.random.default_rng(0).random(20_001)
    edges = np.linspace(0, 20_001, 601).round().astype(int)
    assert np.allclose(binned(long), [long[a:b].mean() for a, b in pairwise(edges)])


def test_tracks_are_shares_over_the_prompts_that_are_so_long():
    evidence = Evidence()
    for layout in (layout_of(2, 1, 1), layout_of(1, 2, 4)):
        evidence.add(trace_of(layout))
    found = tracks(evidence)
    assert list(found) == [TEXT, AUDIO, VIDEO]
    assert found[VIDEO].tolist() == [0, 1, 0.5, 0, 0, 0, 0, 0]
    assert found[AUDIO].tolist() == [0, 0, 0.5, 1, 0, 0, 0, 0]
    assert found[TEXT].tolist() == [1, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("keep", "audio", "video"),
    [
        (Keep(audio=Tokens(3), video=Tokens(5)), [3, 3], [5, 5]),
        (Keep(audio=Tokens(3)), [3, 3], [12, 16]),
        (Keep(media=Before(14)), [1, 0], [12, 13]),
        (Keep(media=Frames(2)), [0, 0], [8, 8]),
    ],
)
def test_what_the_cut_leaves_of_each_modality(tmp_path, keep, audio, video):
    folder = made(tmp_path / "cal", [layout_of(), layout_of(16, 12)], plan=fastav(keep, start=START, drop=0))
    found = modality_cuts(read(folder))
    assert (found[AUDIO].remaining.tolist(), found[VIDEO].remaining.tolist()) == (audio, video)
    assert (found[AUDIO].total.tolist(), found[VIDEO].total.tolist()) == ([8, 12], [12, 16])
    gone = [n // 4 for n, there in zip(video, (12, 16), strict=True) if n < there]
    assert found[VIDEO].seconds.tolist() == gone


def test_a_rule_by_rollout_is_not_drawn_as_a_cut_by_order(tmp_path):
    steps = (Step(layers="2", method="rollout", keep=Keep(audio=Share(0.5), video=Share(0.25))),)
    found = modality_cuts(read(made(tmp_path / "cal", [layout_of()], plan=Plan(steps, "calibrated"))))
    assert not found[AUDIO].is_prefix
    assert (found[AUDIO].remaining.tolist(), found[VIDEO].remaining.tolist()) == ([4], [3])
    assert found[VIDEO].seconds.tolist() == []


def test_pictures_between_the_frames_belong_to_the_nearest_and_are_shown_once():
    layout = layout_of()
    kept = np.array([*range(6), *range(13, 24)])
    preview = Preview(
        frames=np.zeros((4, 9, 16, 3), np.uint8),
        moments=np.array([0.0, 0.9, 1.2, 2.0]),
        peaks=np.zeros((2, 0), np.float32),
        duration=3.0,
    )
    shown = Record(
        clip="a", question="q", trace=trace_of(layout, selections=((2, kept), (3, kept[:3]))), preview=preview
    )
    assert remaining_tokens(shown, 2).sum() == len(kept)
    drawn = [(one.index, one.second, one.remaining, one.total) for one in frame_tokens(shown, 2)]
    assert drawn == [(0, 0.0, 4, 4), (1, 1.0, 1, 4), (3, 2.0, 0, 4)]


def test_stretches_of_sound_are_joined_and_end_with_the_clip():
    layout = layout_of(0, 8)  # four tokens a second
    kept = np.array([0, 1, 2, 5, 9, 10, 11])
    shown = Record(clip="a", question="q", trace=trace_of(layout, selections=((2, kept),)), preview=preview_of(layout))
    assert list(audio_segments(shown, 2)) == [(0.0, 0.5, 1.0), (0.5, 1.0, 0.0), (1.0, 1.25, 1.0), (1.25, 4.0, 0.0)]


def test_the_waveform_is_coloured_by_what_stays_between_two_of_its_moments():
    moments = np.linspace(0, 2, 5)
    found = list(figures._remaining_runs(moments, [(0.0, 0.5, 0.0), (0.5, 0.6, 1.0), (0.6, 1.0, 0.0), (1.0, 2.0, 0.5)]))
    assert found == [(slice(1, 2 + 1), 0.2), (slice(2, 4 + 1), 0.5)]
    assert list(figures._remaining_runs(moments, [])) == []


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (fastav(Keep(media=Frames(4)), drop=0).steps, "Entering layer 14 of 28, the audio and video tokens of the"),
        (fastav(Keep(media=Before(750)), drop=0).steps, "the audio and video tokens before position 750 stay."),
        (fastav(Keep(audio=Tokens(10)), drop=0).steps, "the first 10 audio tokens and all video tokens stay."),
        (fastav(Keep(audio=Tokens(0), video=Tokens(0)), drop=0).steps, "no audio tokens or no video tokens stay."),
        (fastav(Keep(media=Tokens(9)), drop=0.6).steps[1:], "Entering each of the layers 15 to 27, 40 % of the audio"),
        (
            (Step(layers="14", method="rollout", keep=Keep(audio=Share(0.3), video=Share(0.3))),),
            "30 % of the audio tokens and 30 % of the video tokens stay: those that reach the last query most",
        ),
    ],
)
def test_plans_in_words(steps, said):
    sentences = formatting.plan(Plan(tuple(steps)), 28, (TEXT, AUDIO, VIDEO))
    assert said in sentences[0].replace(formatting.SPACE, " ")
    assert len(sentences) == 1


def test_a_folder_without_a_calibration_says_what_to_do(tmp_path):
    with pytest.raises(CalibrationError, match="has no finished calibration"):
        page(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"plan": 3}'])
def test_a_result_of_another_form_is_one_error(tmp_path, text):
    folder = made(tmp_path / "cal", [layout_of()])
    (folder / "result.json").write_text(text)
    with pytest.raises(CalibrationError, match=r"result\.json is not what a calibration writes"):
        page(folder)


def boxed(layout: Layout) -> Layout:
    """The layout, with each frame's four tokens as its quarters."""
    corners = np.array([[0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5]], np.float32)
    box = np.full((len(layout), 4), np.nan, np.float32)
    video = layout.modality == VIDEO
    start = corners[np.arange(video.sum()) % 4]
    box[video] = np.concatenate([start, start + 0.5], axis=1)
    return replace(layout, box=box)


def test_the_example_is_drawn_by_token_where_boxes_are_known(tmp_path):
    text = page(made(tmp_path / "cal", [boxed(layout_of())], question="</script>what?"))
    data = json.loads(text.partition('id="inspection">')[2].partition("</script>")[0])
    assert data["question"] == "</script>what?"
    layout, tokens = layout_of(), data["tokens"]
    stays = (layout.modality == TEXT) | (np.arange(len(layout)) <= 5)
    assert tokens["layers"] == np.where(stays, DEPTH, START).tolist()
    (cut,) = data["cuts"]
    assert (cut["layer"], cut["method"], set(cut["score"])) == (START, "position", {None})
    assert cut["token"] == np.flatnonzero(layout.modality != TEXT).tolist()
    (item,) = data["items"]
    assert [(one["frame"], one["second"]) for one in item["frames"]] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert all(one["uri"].startswith("data:image/jpeg") for one in item["frames"])
    assert item["waveform"]["seconds"] == 4.0
    assert "What it sees" not in text
    assert "FastavViewer.mount" in text


def test_cuts_by_the_last_query_have_the_attention_as_scores(tmp_path):
    layout = boxed(layout_of())
    folder = made(tmp_path / "cal", [layout])
    content = read(folder)
    both = ((START, np.arange(6)), (START + 1, np.arange(4)))
    example = replace(content.example, trace=replace(content.example.trace, selections=both))
    data = example_inspection(replace(content, example=example))
    assert data is not None
    _, fine = data["cuts"]
    assert (fine["layer"], fine["method"], fine["token"]) == (START + 1, "last-query", [1, 2, 3, 4, 5])
    assert fine["score"] == pytest.approx(example.trace.attention[0, START, 1:6].tolist(), rel=1e-5)
    assert fine["kept"] == [1, 1, 1, 0, 0]


def test_records_without_boxes_are_drawn_by_frame(tmp_path):
    folder = made(tmp_path / "cal", [layout_of()])
    assert "What it sees" in page(folder)
    assert "FastavViewer" not in page(folder)
    path = folder / "prompts" / "shown.npz"  # as versions before boxes wrote it
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "layout_box"}
    np.savez(path, **arrays)
    assert np.isnan(Store(folder).load("shown").trace.layout.box).all()
    assert "What it sees" in page(folder)


def test_it_warns_of_cuts_that_drop_what_attention_is_on(tmp_path):
    content = read(made(tmp_path / "cal", [layout_of()]))
    shares = dropped_attention(content)
    moments = content.evidence.profiles["order", AUDIO]
    assert shares[AUDIO] == pytest.approx(1.0)  # the plan keeps no audio
    weight = content.evidence.profiles["order", VIDEO].mean[0, 0, content.before]
    assert shares[VIDEO] == pytest.approx(weight[5:].sum() / weight.sum())
    assert moments.count.tolist() == [1] * 8
    text = page(made(tmp_path / "other", [layout_of()]))
    assert "drops the tokens with 100" in text
    keeps = fastav(Keep(audio=Tokens(8), video=Tokens(12)), start=START, name="calibrated")
    assert "drops the tokens" not in page(made(tmp_path / "all", [layout_of()], plan=keeps))


def compared(folder: Path, *texts: tuple[str, str], traced: int | None = None, failures: Sequence[Any] = ()) -> Path:
    """A finished calibration with these pairs of answers; the question of a pair is its number."""
    costs = {"finish": "stop", "flops": {"ratio": 0.5}, "kv_bytes": {"ratio": 0.4}}
    store = Store(folder)
    entry = {
        "pairs": [f"pair{number}" for number in range(len(texts))],
        "traced": len(texts) + len(failures) if traced is None else traced,
        "max_new_tokens": 64,
        "failures": list(failures),
    }
    made(folder, [layout_of()], comparison=entry)
    for number, both in enumerate(texts):
        answers = [
            {"text": text, "token_ids": [ord(one) for one in text], "seconds": {"prefill": prefill, "decode": 3.0}}
            for text, prefill in zip(both, (2.0, 1.0), strict=True)
        ]
        unpruned, pruned = (answer | costs for answer in answers)
        machine = {"cpu": "A measuring processor", "cores": 4}
        pair = AnswerPair(clip="b.mp4", question=f"<q>{number}", machine=machine, unpruned=unpruned, pruned=pruned)
        store.save_pair(f"pair{number}", pair)
    return folder


def section(html: str, name: str) -> str:
    return html.split(f'<section aria-labelledby="{name}">')[1].split("</section>")[0]


def test_answers_that_differ_come_first_with_their_words_marked_and_equal_ones_are_folded(tmp_path):
    texts = [("a bell", "a bell"), ("a <red> drum", "a <big> drum"), ("yes", "no"), ("", "")]
    html = page(compared(tmp_path / "cal", *texts, traced=9, failures=[("c.mp4", "why <me>?", "no memory")]))
    parsed, answers = Strict(html), section(html, "answers")
    text = Strict(answers).text
    assert answers.index("&lt;q&gt;2") < answers.index("&lt;q&gt;1")
    assert answers.index("&lt;q&gt;1") < answers.index("<details>") < answers.index("&lt;q&gt;0")
    assert re.findall("<mark>(.*?)</mark>", answers) == ["marked", "yes", "no", "red", "big"]
    assert "a &lt;<mark>red</mark>&gt; drum" in answers
    for said in (
        "have answered 5 of 9 prompts, evenly spread, greedily, with at most 64 tokens",
        "Same answer 2 of 4 50.0 [15.0, 85.0]",
        "Same first token 3 of 4 75.0",
        "ROUGE-L",
        "Answers that differ: 2 of 4",
        "Answers that stay the same: 2 of 4",
        "(nothing)",
        "why <me>? c.mp4 no memory",
    ):
        assert said in " ".join(text.split()), said
    assert "2 of 4 answers stay the same" in parsed.text


def test_measured_time_is_beside_flops_with_its_machine_and_told_to_be_noisy_if_few(tmp_path):
    few = Strict(section(page(compared(tmp_path / "few", *[("a", "a")] * 3)), "layers")).text
    many = Strict(section(page(compared(tmp_path / "many", *[("a", "a")] * 12)), "layers")).text
    for text in (few, many):
        assert "50.0 % Prefill time, measured, median over" in text
        assert "100.0 % Decoding time per token, measured" in text
        assert "Prefill 2 s 1 s 50.0 % 50.0 to 50.0 %" in text
        assert "A measuring processor, 4 cores; weights in float32 on cpu" in text
    assert "There are only 3 of them, so these times are noisy." in few
    assert "noisy" not in many


def test_answers_that_are_all_the_same_are_told_so(tmp_path):
    html = page(compared(tmp_path / "cal", ("a", "a")))
    assert "No answer differs." in html
    assert "have answered the only prompt" in Strict(html).text
    assert "Answers that differ" not in html


def test_answers_that_differ_in_spaces_alone_say_so(tmp_path):
    assert page(compared(tmp_path / "cal", ("a b", "a  b"))).count("Only spaces differ.") == 1


def test_a_folder_without_answers_says_how_to_add_them(tmp_path):
    folder = made(tmp_path / "cal", [layout_of()])
    assert read(folder).comparison is None
    html = page(folder)
    assert "The folder of this calibration has no answers of all prompts." in Strict(html).text
    assert "Measured time" not in html
    assert "answers stay the same" not in Strict(html).text


def test_answers_that_cannot_be_read_are_named(tmp_path):
    folder = compared(tmp_path / "cal", ("a", "b"))
    (folder / "answers" / "pair0.json").write_text("{")
    with pytest.raises(CalibrationError, match=r"pair0\.json"):
        page(folder)
    result = Store(folder).result()
    Store(folder).finish(result | {"comparison": {"pairs": []}})
    with pytest.raises(CalibrationError, match="is not what a calibration writes"):
        page(folder)


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, name):
    for module in [module for module in sys.modules if f"{module}.".startswith(("fastav.report.", f"{name}."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InstallationError, match=f"needs {name}, which is not installed") as caught:
        importlib.import_module("fastav.report.calibration")
    assert "pip install '.[report]'" in caught.value.hint
