"""The drawing of an inspection, in a page of its own that no server serves."""

import json
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "src/fastav/report"
MODALITIES = ["text", "audio", "video", "image"]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP8AAP///ywAAAAAAQABAAACAkQBADs="

pytestmark = pytest.mark.browser


class Prompt:
    """Tokens and clips of an inspection, put together piece by piece."""

    def __init__(self, layers):
        self.layers = layers
        self.tokens = {name: [] for name in ("modality", "item", "frame", "second", "box", "padding", "text", "layers")}
        self.items, self.cuts = [], []

    def add(self, modality, *, item=-1, frame=-1, second=None, box=None, text=None):
        values = (MODALITIES.index(modality), item, frame, second, box, 0, text, self.layers)
        for column, value in zip(self.tokens.values(), values, strict=True):
            column.append(value)
        return self

    def say(self, *words):
        for word in words:
            self.add("text", text=word)
        return self

    def clip(self, kind, *, frames=0, grid=2, boxes=True, sound=0, seconds=True, waveform=True):
        item = len(self.items)
        modality = "image" if kind == "image" else "video"
        shown = [{"frame": f, "second": f / 2, "width": 16, "height": 9, "uri": PIXEL} for f in range(frames)]
        for f in range(frames):
            for row in range(grid):
                for column in range(grid):
                    box = [row / grid, column / grid, (row + 1) / grid, (column + 1) / grid] if boxes else None
                    self.add(modality, item=item, frame=f, second=f / 2, box=box)
        for i in range(sound):
            self.add("audio", item=item, second=i / 10 if seconds else None)
        wave = {"start": 0.0, "seconds": max(sound, 1) / 10, "low": [-0.5] * 40, "high": [0.5] * 40}
        self.items.append(
            {
                "kind": kind,
                "name": f"{kind}-{item}",
                "seconds": None if kind == "image" else 4.0,
                "frames": shown,
                "waveform": wave if sound and waveform else None,
            }
        )
        return self

    def cut(self, layer, *, keep_every=2, method="position", cache_only=False, scores=True):
        text = MODALITIES.index("text")
        candidates = [
            t for t, m in enumerate(self.tokens["modality"]) if m != text and self.tokens["layers"][t] == self.layers
        ]
        kept = [int(i % keep_every == 0) for i in range(len(candidates))]
        score = [i / 100 if scores else None for i in range(len(candidates))]
        if not cache_only:
            for token, stays in zip(candidates, kept, strict=True):
                if not stays:
                    self.tokens["layers"][token] = layer
        cut = {"layer": layer, "method": method, "cache_only": cache_only}
        self.cuts.append({**cut, "token": candidates, "score": score, "kept": kept})
        return self

    def inspection(self):
        cost = {"full": 2e9, "pruned": 1e9, "ratio": 0.5}
        return {
            "schema": 1,
            "model": "toy",
            "plan": "mine",
            "plan_json": {},
            "question": "what?",
            "layers": self.layers,
            "modalities": MODALITIES,
            "tokens": self.tokens,
            "cuts": self.cuts,
            "items": self.items,
            "flops": cost,
            "kv_bytes": cost,
        }


@pytest.fixture
def mount(open_tab):
    """A function that mounts an inspection in an empty page, and returns the page."""

    def mounted(prompt, *, options=None, **context):
        tab = open_tab(**context)
        css, js = ((REPORT / name).read_text() for name in ("viewer.css", "viewer.js"))
        tab.set_content(f"<!DOCTYPE html><style>{css}</style><div id='here'></div><script>{js}</script>")
        tab.evaluate(
            "([inspection, options]) => { window.viewer = FastavViewer.mount(here, inspection, options) }",
            [prompt.inspection(), options or {}],
        )
        return tab

    return mounted


def _headline(tab):
    return tab.locator(".fv-headline").inner_text()


def _legend(tab):
    return " ".join(tab.locator(".fv-legend").inner_text().split())


def test_counts_of_a_layer_are_those_of_the_tokens_that_run(mount):
    tab = mount(Prompt(4).say("a", " b").clip("video", frames=2, sound=8).cut(2))
    assert _legend(tab) == "text 2 of 2 audio 4 of 8 video 4 of 8 dropped"  # every second one
    tab.evaluate("viewer.setLayer(1)")
    assert _legend(tab) == "text 2 of 2 audio 8 of 8 video 8 of 8 dropped"
    assert tab.locator(".fv [role=status]").inner_text() == "layer 1: 18 of 18 tokens remain"


@pytest.mark.parametrize("layer", [-5, 99, 1.4])
def test_a_layer_out_of_range_is_the_nearest(mount, layer):
    tab = mount(Prompt(4).clip("video", frames=1).cut(2))
    tab.evaluate(f"viewer.setLayer({layer})")
    assert tab.evaluate("viewer.layer") == min(max(round(layer), 0), 3)


def test_kept_patches_are_lit_and_dropped_ones_are_not(mount):
    tab = mount(Prompt(2).clip("video", frames=1).cut(1))
    opacity = """() => { const canvas = document.querySelector('.fv-picture canvas'), context = canvas.getContext('2d');
        const at = (x, y) => context.getImageData(canvas.width * x, canvas.height * y, 1, 1).data[3];
        return [at(.25, .25), at(.75, .25), at(.25, .75), at(.75, .75)].map((alpha) => alpha > 0); }"""
    tab.wait_for_function("document.querySelector('.fv-picture img').complete")
    assert tab.evaluate(opacity) == [True, False, True, False]
    tab.evaluate("viewer.setLayer(0)")
    assert tab.evaluate(opacity) == [True] * 4


def test_hovering_tells_score_rank_and_where_a_token_was_dropped(mount):
    tab = mount(Prompt(8).clip("video", frames=1).cut(2, method="last-query"))
    box = tab.locator(".fv-picture").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.25)
    tip = tab.locator(".fv-tip").inner_text()
    assert "score 0.01 at layer 2 (last-query)" in tip
    assert "rank 3 of 4" in tip
    assert "dropped at layer 2 by last-query" in tip
    tab.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
    assert "kept in all 8 layers" in tab.locator(".fv-tip").inner_text()


def test_the_score_is_of_the_next_cut_from_the_layer_on(mount):
    tab = mount(Prompt(8).clip("video", frames=1).cut(2).cut(5, method="last-query"))
    for layer, cut in ((0, "layer 2 (position)"), (2, "layer 2 (position)"), (3, "layer 5 (last-query)")):
        tab.evaluate(f"viewer.setLayer({layer})")
        tab.locator(".fv-view").first.focus()
        tab.keyboard.press("Home")
        assert cut in tab.locator(".fv-tip").inner_text()
        tab.keyboard.press("Escape")


def test_a_method_without_scores_is_told_so(mount):
    tab = mount(Prompt(4).clip("video", frames=1).cut(2, scores=False, method="given"))
    tab.locator(".fv-picture").hover()
    assert "given gives no score" in tab.locator(".fv-tip").inner_text()


def test_scores_are_shown_as_colours_on_request(mount):
    tab = mount(Prompt(4).clip("video", frames=1).clip("audio", sound=4).cut(2))
    colour = """(where) => { const canvas = document.querySelector('.fv-picture canvas');
        return [...canvas.getContext('2d').getImageData(canvas.width * where, canvas.height / 4, 1, 1).data] }"""
    tab.evaluate("viewer.setLayer(2)")
    tab.get_by_role("checkbox", name="colour by score").check()
    assert tab.evaluate(colour, 0.25) == [0, 0, 4, 255]  # the lowest score
    assert tab.evaluate(colour, 0.75)[3] == 0  # dropped
    tab.evaluate("viewer.setLayer(0)")
    assert tab.evaluate(colour, 0.75)[3] == 255
    assert mount(Prompt(4).clip("video", frames=1)).get_by_role("checkbox").count() == 0


def test_frames_without_boxes_fade_by_their_share(mount):
    tab = mount(Prompt(4).clip("video", frames=1, boxes=False).cut(2))
    assert tab.locator(".fv-foot b").inner_text() == "50 %"
    assert tab.locator(".fv-picture canvas").is_hidden()
    assert tab.locator(".fv-frame").evaluate("frame => frame.style.getPropertyValue('--fv-gone')") == "0.5"


def test_padding_is_apart_from_sound_without_a_time(mount):
    prompt = Prompt(4).clip("audio", sound=6, seconds=False)
    prompt.tokens["padding"][4:] = [1, 1]
    headings = mount(prompt).locator(".fv-subhead").all_inner_texts()
    assert headings == ["4 audio tokens, seconds unknown", "2 audio tokens, padding"]


def test_cuts_of_the_cache_alone_drop_no_token(mount):
    tab = mount(Prompt(4).clip("video", frames=2, sound=4).cut(1, method="window", cache_only=True))
    tab.evaluate("viewer.setLayer(1)")
    assert "12 of 12 tokens remain · 6 in its KV cache" in " ".join(_headline(tab).split())
    tab.evaluate("viewer.setLayer(2)")
    assert "in its KV cache" not in _headline(tab)
    tab.locator(".fv-view").first.focus()
    tab.keyboard.press("ArrowRight")
    assert "runs in all layers, left out of 1 cache" in tab.locator(".fv-tip").inner_text()


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (Prompt(4).say("Hi").clip("audio", sound=30).cut(2), ".fv-sound"),
        (Prompt(4).clip("audio", sound=30, waveform=False).cut(2), ".fv-silent"),
        (Prompt(4).clip("video", frames=2, sound=30, seconds=False).cut(2), ".fv-slots"),
        (Prompt(4).clip("image", frames=1, grid=4).cut(2), ".fv-single"),
        (Prompt(4).clip("video", frames=3).clip("audio", sound=9).cut(0), ".fv-item:nth-of-type(2)"),
        (Prompt(4).say("only", " text"), ".fv-chip"),
        (Prompt(1).clip("video", frames=1), ".fv-frames"),
        (Prompt(64).clip("video", frames=4).cut(32), ".fv-column:nth-child(64)"),
    ],
    ids=["sound", "no waveform", "no seconds", "image", "two clips", "text", "one layer", "64 layers"],
)
@pytest.mark.parametrize("width", [360, 1280])
def test_all_kinds_of_prompts_are_drawn(mount, prompt, shown, width):
    tab = mount(prompt, viewport={"width": width, "height": 800})
    assert tab.locator(shown).first.is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    for view in tab.locator(".fv-view").all():
        view.focus()
        for key in ("End", "ArrowUp", "Home", "ArrowDown", "ArrowRight"):
            tab.keyboard.press(key)
            assert tab.locator(".fv-tip").is_visible()
        left = tab.locator(".fv-tip").bounding_box()["x"]
        assert left >= 0


def test_a_layer_is_drawn_within_a_frame_of_a_film(mount):
    prompt = Prompt(64).say(*["word"] * 50).clip("video", frames=64, grid=8, sound=900)
    for layer in range(32, 64):
        prompt.cut(layer, keep_every=8 if layer == 32 else 5)
    tab = mount(prompt)
    milliseconds = tab.evaluate("""() => {
        const start = performance.now();
        for (let layer = 0; layer < 64; layer++) viewer.setLayer(layer);
        return (performance.now() - start) / 64;
    }""")
    assert milliseconds < 40  # about 5 where nothing else runs


def test_playing_goes_to_the_last_layer_once(mount):
    tab = mount(Prompt(6).clip("video", frames=1).cut(3), options={"autoplay": True}, reduced_motion="no-preference")
    tab.get_by_role("button", name="Pause").wait_for()
    tab.get_by_role("button", name="Play").wait_for()
    assert tab.evaluate("viewer.layer") == 5


def test_nothing_plays_by_itself_for_those_who_want_no_motion(mount):
    tab = mount(Prompt(6).clip("video", frames=1).cut(3), options={"autoplay": True})
    assert tab.evaluate("viewer.layer") == 5
    assert tab.get_by_role("button", name="Pause").count() == 0


def test_text_of_an_inspection_is_never_html(mount):
    prompt = Prompt(2).say("<img src=x onerror=alert(1)>").clip("video", frames=1)
    prompt.items[0]["name"] = "<b>clip</b>"
    tab = mount(prompt, options={"title": "<i>title</i>"})
    assert tab.locator(".fv-chip img, .fv-itemhead b b, .fv-name i").count() == 0
    assert "<b>clip</b>" in tab.locator(".fv-itemhead").inner_text()


def test_the_table_has_the_numbers_of_all_layers(mount):
    tab = mount(Prompt(3).clip("video", frames=1).cut(1))
    tab.locator(".fv-table summary").click()
    rows = [row.split() for row in tab.locator(".fv-table tbody tr").all_inner_texts()]
    assert rows == [["0", "4", "4"], ["1", "2", "2", "position"], ["2", "2", "2"]]


def test_an_unmounted_viewer_leaves_nothing(mount):
    tab = mount(Prompt(3).clip("video", frames=1).cut(1))
    tab.evaluate("viewer.destroy()")
    assert tab.locator("#here").inner_html() == ""


def test_an_inspection_of_another_schema_is_refused(mount):
    tab = mount(Prompt(3).clip("video", frames=1))
    message = tab.evaluate(
        "() => { try { FastavViewer.mount(document.body, {schema: 2}) } catch (error) { return error.message } }"
    )
    assert "schema 1, not 2" in message


@pytest.mark.parametrize(
    ("left", "right", "marked"),
    [
        ("a red dog", "a red dog", ([], [])),
        ("a red dog.", "a green dog.", (["red"], ["green"])),
        ("yes", "yes, and a knock", ([], ["and", "a", "knock"])),
        ("yes.", "yes", (["yes."], ["yes"])),
        ("", "something", ([], ["something"])),
    ],
)
def test_texts_are_compared_word_by_word(mount, left, right, marked):
    tab = mount(Prompt(1).say("x"))
    compared = tab.evaluate(f"FastavViewer.compareTexts({json.dumps(left)}, {json.dumps(right)})")
    found = tuple([word["text"].strip() for word in compared[side] if not word["same"]] for side in ("left", "right"))
    assert found == marked
    assert compared["same"] == (left == right)
