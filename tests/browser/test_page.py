"""The page of `fastav serve` in a browser."""

import json
import re
from pathlib import Path

import pytest

CLIPS = Path(__file__).parents[2] / "src/fastav/assets/clips"
SIDES = ("left", "right")

pytestmark = pytest.mark.browser


def _choose_example(page, number=0):
    page.locator("#examples button").nth(number).click()
    page.wait_for_selector(f"#examples li:nth-child({number + 1}) button[aria-pressed=true]")


def _upload(page, path):
    page.set_input_files("#file", path)
    page.wait_for_selector("#clip-name:not(:empty)")
    page.wait_for_selector("#upload", state="hidden")


def _ask(page, question=None):
    if question:
        page.fill("#question", question)
    page.click("#ask")
    _wait_for_answers(page)


def _wait_for_answers(page):
    for side in SIDES:
        page.wait_for_selector(f"#{side}[data-status=done]")


def _wait_for_viewer(page):
    page.wait_for_selector("#viewer .fv-headline b")


def _text(page, selector):
    return page.locator(selector).first.inner_text()


def _visible_alerts(page):
    return [text for text in page.locator("[role=alert]:visible").all_inner_texts() if text]


def _overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_an_uploaded_clip_is_answered_with_two_plans(page):
    _upload(page, CLIPS / "triangle.mp4")
    assert "triangle.mp4" in _text(page, "#clip-name")
    _ask(page, "which shape moves?")
    for side in SIDES:
        assert _text(page, f"#{side} .text")
        costs = _text(page, f"#{side} .costs")
        assert all(name in costs for name in ("time", "prefill", "KV cache", "tokens"))
    assert page.locator("#left-plan").input_value() == "none"
    assert _text(page, "#badge") in ("same answer", "answers differ")
    assert re.search(r"0\.\d\d\u00d7", _text(page, "#gains"))
    assert _visible_alerts(page) == []


def test_answers_stream(page):
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => window.seen.push(document.getElementById('left').dataset.status))
            .observe(document.getElementById('left'), {attributes: true, attributeFilter: ['data-status']});
    }""")
    _choose_example(page)
    _ask(page)
    seen = page.evaluate("window.seen")
    assert seen.index("waiting") < seen.index("streaming") < seen.index("done")


def test_words_that_only_one_answer_has_are_marked(page):
    replies = iter(["a red circle on the left", "a green circle on the left"])

    def answer(route):
        chunk = {"choices": [{"index": 0, "delta": {"content": next(replies)}}]}
        body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        route.fulfill(status=200, headers={"Content-Type": "text/event-stream"}, body=body)

    page.route("**/v1/chat/completions", answer)
    _choose_example(page)
    _ask(page)
    page.wait_for_selector("#badge.differs")
    assert sorted(page.locator(".answer mark").all_inner_texts()) == ["green", "red"]


def test_the_slider_shows_what_each_layer_keeps(page):
    _choose_example(page)
    _ask(page)
    _wait_for_viewer(page)
    slider = page.get_by_role("slider", name="Layer")
    last = int(slider.get_attribute("max"))
    assert int(slider.input_value()) == last  # no animation for those who want none
    at_the_end = int(_text(page, ".fv-headline b").replace(",", ""))
    slider.focus()
    page.keyboard.press("Home")
    assert int(_text(page, ".fv-headline b").replace(",", "")) > at_the_end
    assert re.fullmatch(r"layer 0: [\d,]+ of [\d,]+ tokens remain.*", page.locator(".fv [role=status]").inner_text())
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext").startswith("layer 1:")
    page.locator(".fv-column").nth(last).click()
    assert int(slider.input_value()) == last


def test_the_viewer_switches_to_the_other_plan_at_the_same_layer(page):
    _choose_example(page)
    _ask(page)
    _wait_for_viewer(page)
    slider = page.get_by_role("slider", name="Layer")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    layer = slider.input_value()
    page.locator("#sides label", has_text=re.compile("^none$")).click()
    page.locator("#viewer .fv-cuts", has_text="no cuts").wait_for()
    assert page.get_by_role("slider", name="Layer").input_value() == layer


def test_a_broken_file_is_one_clear_sentence(page, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is no clip" * 100)
    page.set_input_files("#file", broken)
    page.wait_for_selector("#upload", state="hidden")
    if not page.locator("#clip-error:visible").count() or "browser" in _text(page, "#clip-error"):
        page.fill("#question", "which shape moves?")
        page.click("#ask")
        page.wait_for_selector("#ask-error:visible")
    alerts = _visible_alerts(page)
    assert alerts
    assert not any("Traceback" in text or "{" in text for text in alerts)


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_the_screen(open_tab, address, width):
    page = open_tab(viewport={"width": width, "height": 740}, has_touch=True)
    page.goto(address)
    page.wait_for_selector("#examples button")
    assert _overflow(page) == 0
    _choose_example(page)
    _ask(page)
    _wait_for_viewer(page)
    page.locator("#outgrow summary").click()
    page.locator("#left-plan").select_option("custom…")
    assert _overflow(page) == 0


def test_everything_works_with_the_keyboard(page):
    page.locator("#examples button").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#clip-name:not(:empty)")
    page.locator("#question").focus()
    page.keyboard.press("Enter")
    _wait_for_answers(page)
    _wait_for_viewer(page)
    play = page.get_by_role("button", name="Play from the first layer to the last")
    play.focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").wait_for()
    page.keyboard.press("Space")
    view = page.locator(".fv-view").first
    page.get_by_role("slider", name="Layer").focus()
    for _ in range(12):  # past the buttons of the cuts
        page.keyboard.press("Tab")
        if view.evaluate("element => element === document.activeElement"):
            break
    first = _text(page, ".fv-tip")
    assert first
    page.keyboard.press("ArrowRight")
    assert _text(page, ".fv-tip") != first
    page.keyboard.press("Escape")
    assert page.locator(".fv-tip").is_hidden()


def test_every_control_has_a_name(page):
    nameless = page.evaluate("""() => {
        const named = (element) => element.textContent.trim() || element.ariaLabel || element.labels?.length;
        const controls = [...document.querySelectorAll('button, input, select, textarea')];
        return controls.filter((element) => !named(element)).map((element) => element.outerHTML);
    }""")
    assert nameless == []


def _background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_theme_is_the_systems_until_one_is_chosen(open_tab, address):
    page = open_tab(color_scheme="dark")
    page.goto(address)
    dark = _background(page)
    page.emulate_media(color_scheme="light")
    light = _background(page)
    assert light == "rgb(255, 255, 255)" != dark
    page.get_by_role("button", name="Dark").click()
    assert _background(page) == dark
    page.reload()
    page.get_by_role("button", name="Light").wait_for()
    assert _background(page) == dark


def test_the_report_opens_without_a_server(page, open_tab, tmp_path):
    _choose_example(page)
    _ask(page)
    _wait_for_viewer(page)
    with page.expect_download() as download:
        page.click("#report")
    path = tmp_path / "report.html"
    download.value.save_as(path)
    assert "{{" not in path.read_text()
    assert "http://" not in path.read_text().replace(page.url, "")

    report = open_tab(offline=True)
    report.goto(path.as_uri())
    assert _text(report, "#question") == page.locator("#question").input_value()
    assert report.locator(".run").count() == 2
    assert report.locator(".fv").count() == 1
    report.get_by_role("slider", name="Layer").focus()
    report.keyboard.press("Home")
    assert "layer 0" in _text(report, ".fv-headline")
    report.get_by_role("tab", name="none").click()
    assert "no cuts" in _text(report, ".panel:visible .fv-cuts")
    report.get_by_role("button", name="Side by side").click()
    assert report.locator(".fv:visible").count() == 2
    report.get_by_role("slider", name="Layer").first.focus()
    report.keyboard.press("ArrowRight")
    assert [text.split("\n")[0][:7] for text in report.locator(".fv-headline").all_inner_texts()] == ["layer 1"] * 2


def test_a_question_can_be_cancelled(page):
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    _choose_example(page)
    page.click("#ask")
    page.locator("#cancel").click()
    for side in SIDES:
        page.wait_for_selector(f"#{side}[data-status=cancelled]")
    assert page.locator("#ask").is_enabled()
    assert page.locator("#history-section").is_hidden()


def test_errors_are_shown_where_their_cause_is(page):
    page.click("#ask")
    assert _text(page, "#ask-error") == "Choose a clip first."
    _choose_example(page)
    page.locator("#right-plan").select_option("custom…")
    page.fill("#right-custom", '{"steps": [')
    page.click("#ask")
    assert _text(page, "#ask-error").startswith("The right plan cannot be read:")
    page.fill("#right-custom", "no-such-plan")
    page.click("#ask")
    page.wait_for_selector("#right .error:visible")
    assert "no-such-plan" in _text(page, "#right .error")
    page.wait_for_selector("#left[data-status=done]")
    assert page.locator("#ask-error").is_hidden()


def test_a_busy_server_tells_when_to_try_again(page):
    body = json.dumps(
        {"error": {"message": "The server is busy.", "type": "server_error", "param": None, "code": None}}
    )
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=503, headers={"Retry-After": "7"}, body=body)
    )
    _choose_example(page)
    page.click("#ask")
    page.wait_for_selector("#ask-error:visible")
    assert _text(page, "#ask-error") == "The server is busy. Try again in 7 s."


def test_the_key_is_asked_for_when_the_server_wants_one(open_tab, address):
    page = open_tab()
    body = json.dumps({"error": {"message": "This server needs a key.", "type": "authentication_error"}})

    def guard(route):
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, body=body)

    page.route("**/v1/**", guard)
    page.goto(address)
    page.wait_for_selector("#key-form:visible")
    assert _text(page, "#key-note") == "This server needs a key."
    page.keyboard.type("secret")  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#examples button")
    assert page.locator("#key-form").is_hidden()
    _choose_example(page)
    _ask(page)


def test_the_history_restores_a_question(page):
    _choose_example(page)
    _ask(page)
    question = page.locator("#question").input_value()
    answer = _text(page, "#right .text")
    page.locator("#right-plan").select_option("fastv")
    page.fill("#right-budget", "0.5")
    _choose_example(page, 1)
    _ask(page, "what sound do you hear?")
    assert page.locator("#history button").count() == 2
    page.locator("#history button").nth(1).click()
    assert page.locator("#question").input_value() == question
    assert page.locator("#right-plan").input_value() != "fastv"
    assert _text(page, "#right .text") == answer
    _wait_for_viewer(page)
    page.locator("#history button").nth(0).click()
    assert page.locator("#right-budget").input_value() == "0.5"


def test_all_questions_of_an_example_can_be_chosen(page):
    questions = page.evaluate("fetch('/v1/examples').then((r) => r.json()).then((list) => list.data[0].questions)")
    _choose_example(page)
    more = page.get_by_role("button", name=re.compile(r"^\d+ more$"))
    if more.count():
        more.click()
    assert page.locator("#suggestions button").all_inner_texts() == questions
    page.locator("#suggestions button").last.click()
    assert page.locator("#question").input_value() == questions[-1]


def test_the_code_asks_the_same(page):
    _choose_example(page)
    page.fill("#question", 'is it "red", or isn\'t it?')
    page.locator("#right-plan").select_option("custom…")
    page.fill("#right-custom", '{"name": "mine", "steps": [], "cache_only": false}')
    code = _text(page, "#code")
    compile(code, "code", "exec")
    assert "False" in code
    assert r"is it \"red\", or isn" in code
    page.locator("#languages label", has_text="curl").click()
    assert "curl -s" in _text(page, "#code")
    assert "isn'\\''t" in _text(page, "#code")


def test_a_recording_is_a_clip(open_tab, address):
    page = open_tab(permissions=["camera", "microphone"])
    page.goto(address)
    page.wait_for_selector("#examples button")
    page.click("#record")
    page.locator("#record-text", has_text="Stop, 1.").wait_for()
    assert page.locator("#video").is_visible()
    page.click("#record")
    page.locator("#clip-name", has_text="recording.").wait_for()
    _ask(page, "what sound do you hear?")
    assert _text(page, "#right .text")


def test_recording_without_permission_says_what_to_do(page):
    page.evaluate("""() => {
        navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', 'NotAllowedError') };
    }""")
    page.click("#record")
    page.wait_for_selector("#clip-error:visible")
    assert "not allowed to use camera and microphone" in _text(page, "#clip-error")
    assert _text(page, "#record-text") == "Record"


def test_recording_needs_a_browser_that_can(page):
    page.evaluate("delete window.MediaRecorder")
    page.click("#record")
    assert _text(page, "#clip-error") == "This browser cannot record. Choose a file in its place."
