"""The page of `msd serve` in headless Chromium. Every request that is not to the server fails the test."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
import httpx2
from PIL import Image

from events.writers import csv, npy_dict, npz, scene
from msd.events import event_frames
from msd.events.clip import event_clip
from msd.serve.site import FILES, FOLDER
from msd.streaming import request_lock
from serve.routed import routed
from serve.server import NAME, asks, data_uri, picture, running
from serve.test_trace import wait

VLM = routed()
SECONDS = 60_000  # Playwright's limits are in ms
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# what holds without a browser


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Any]]:
    with running(VLM, rows=4, waiting=8) as (address, _, scheduler):
        yield address, scheduler


class Markup(HTMLParser):
    """Collects tags; fails on one that is closed without having been opened."""

    VOID = ("meta", "link", "input", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_markup_is_whole_and_nothing_in_it_is_inline() -> None:
    page = Markup()
    page.feed((FOLDER / "index.html").read_text())
    assert page.open == []
    names = [a["id"] for _, a in page.seen if "id" in a]
    assert len(names) == len(set(names))
    for tag, attributes in page.seen:
        assert tag != "style" and not any(name == "style" or name.startswith("on") for name in attributes)
        assert tag != "script" or attributes.get("src")
        for reference in ("for", "aria-labelledby", "aria-describedby"):
            assert attributes.get(reference) in (None, *names)
    used = {name for f in FOLDER.glob("*.js") for name in re.findall(r"\$\('([\w-]+)'\)", f.read_text())}
    assert used <= set(names)


@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.iterdir()))
def test_no_file_names_another_address(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert set(re.findall(r"[a-z]+://[^\s'\"`]+", text)) <= {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "import(" not in text and "eval(" not in text and "innerHTML" not in text


def test_the_files_are_served_with_a_strict_policy_and_without_a_key() -> None:
    with running(VLM, keys=("sesame",)) as (address, _, _):
        for path, file in FILES.items():
            answer = httpx2.get(address + path)
            assert answer.status_code == 200 and answer.text == file.read_text()
            policies = answer.headers.get_list("content-security-policy")
            assert len(policies) == 1 and "default-src 'none'" in policies[0] and "unsafe" not in policies[0]
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("/page/../site.py", "/page/%2e%2e/site.py", "/page/", "/page/nothing.js", "/v1/msd"):
            assert httpx2.get(address + path).status_code in (401, 404)
        assert httpx2.post(f"{address}/v1/msd/gain", json={}).status_code == 401


# in the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox does not start as root, as in a container; pages of this test come from this process
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, served: tuple[str, Any], tmp_path: Path) -> Iterator[Any]:
    """The page, with a photo chosen. Fails for requests to elsewhere, errors of scripts, and breaches of the policy."""
    yield from opened(browser, served[0], tmp_path)


def opened(browser: Any, address: str, folder: Path, refused: tuple[str, ...] = (), **context: Any) -> Iterator[Any]:
    """refused: beginnings of the messages that are expected on the console."""
    made = browser.new_context(**context)
    shown = made.new_page()
    shown.set_default_timeout(SECONDS)
    elsewhere: list[str] = []
    failures: list[str] = []

    def route(route: Any) -> None:
        url = route.request.url
        if url.startswith(f"{address}/"):
            route.continue_()
        else:
            elsewhere.append(url)
            route.abort()

    shown.route("**/*", route)
    shown.on("pageerror", lambda error: failures.append(str(error)))
    shown.on("console", lambda message: failures.append(message.text) if message.type in ("error", "warning") else None)
    shown.goto(f"{address}/")
    photo = folder / "photo.png"
    photo.write_bytes(picture(1, (64, 48)))
    shown.set_input_files("#file", photo)
    shown.fill("#most", "16")
    yield shown
    made.close()
    assert elsewhere == []
    assert [text for text in failures if not text.startswith(refused or ("\0",))] == []


def ask(page: Any, question: str = "What is it?") -> None:
    page.fill("#question", question)
    page.click("#go")
    page.wait_for_selector("#go:enabled")


def alone(question: str = "What is it?") -> Any:
    messages = asks(question, data_uri(picture(1, (64, 48))))
    return VLM.generate(messages=messages, max_new_tokens=16)


def test_an_answer_is_shown_with_modalities_drafts_and_a_tree(page: Any) -> None:
    ask(page)
    answer = alone()
    tokens = page.locator("#tokens .token")
    assert tokens.count() == len(answer.tokens)
    assert page.locator("#status").text_content() == f"Answer: {answer.text}"
    kinds = [token.get_attribute("data-modality") for token in tokens.all()]
    assert kinds == [kind or "" for kind in answer.predicted_modality]
    statistics = answer.statistics
    steps = int(page.get_attribute("#step", "max"))
    assert page.locator("#step-number").text_content() == f"{steps} of {steps}"
    totals = page.locator("#totals dd").all_text_contents()
    assert totals[:3] == [str(len(answer.tokens)), str(steps), f"{statistics.mean_acceptance_length:.2f}"]
    assert page.locator(".token.accepted").count() == int(totals[4]) > 0
    rows = {r[0]: r[1:] for r in (row.all_text_contents() for row in counted(page))}
    assert sum(int(r[0]) for r in rows.values()) == len(answer.tokens)
    assert sum(int(r[2]) for r in rows.values()) == int(totals[3])
    page.fill("#step", "1")  # the first step's tree
    drawn = page.locator("#tree svg")
    assert drawn.locator("g.root").count() == drawn.locator("g.target").count() == 1
    drafted = int(re.match(r"\d+", page.locator("#step-note").text_content()).group())
    assert drawn.locator("g.accepted, g.rejected").count() == drafted > 0
    assert "drafted" in drawn.get_attribute("aria-label")


def counted(page: Any) -> list[Any]:
    return [row.locator("th, td") for row in page.locator("#counts tr").all()]


def test_tokens_appear_as_they_are_emitted(page: Any, served: tuple[str, Any]) -> None:
    """The model is held after some steps: their tokens are shown, and the answer has not ended."""
    scheduler = served[1]
    page.fill("#most", "400")
    page.fill("#temperature", "1")
    page.click("#go")
    page.wait_for_selector(".token:nth-child(3)")
    with request_lock(VLM.model):
        page.wait_for_selector("#tree svg")
        assert page.locator("#go").is_disabled() and page.locator("#answer").get_attribute("aria-busy") == "true"
        assert scheduler.running == 1
        page.click("#stop")
        page.wait_for_selector("#go:enabled")
        wait(lambda: all(job.cancelled for job in scheduler.batch.members))
    wait(lambda: not scheduler.running)
    assert page.locator("#error").text_content() == ""


def test_the_gain_of_the_image_is_shown_on_the_photo(page: Any) -> None:
    assert page.locator("#measure").is_disabled()
    ask(page)
    page.click("#measure")
    page.wait_for_selector("#blocks i:nth-child(16)", state="attached")
    assert "nats" in page.locator("#map").text_content()
    page.locator(".token").nth(2).click()
    assert "gain of the image" in page.locator("#detail").text_content()
    shades = [float(block.evaluate("block => block.style.opacity")) for block in page.locator("#blocks i").all()]
    assert len(shades) == 16 and max(shades) > 0
    assert all(row.all_text_contents()[2] != "–" for row in counted(page) if row.all_text_contents()[1] != "0")
    page.click("#remove")
    assert page.locator("#blocks i").count() == 0 and page.locator("#photo").is_hidden()


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_plain_decoding_is_run_to_compare(page: Any, temperature: str) -> None:
    page.fill("#temperature", temperature)
    page.check("#compare")
    ask(page)
    assert "Both answers are identical." in page.locator("#compared").text_content()
    text = page.locator("#plain-text").text_content()
    assert page.locator("#status").text_content() == f"Answer: {text}"
    for rate in ("#rate-drafts", "#rate-plain"):
        assert re.fullmatch(r"[\d.]+ tokens/s", page.locator(rate).text_content())


def test_the_keyboard_is_enough(page: Any) -> None:
    page.locator("#question").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("What is it?")
    for _ in range(4):
        page.keyboard.press("Tab")
    assert focused(page) == "go"
    page.keyboard.press("Enter")
    page.wait_for_selector("#measure:enabled")
    assert page.locator("#tokens .token").count() == len(alone().tokens)
    reached = []
    while "token" not in reached:
        page.keyboard.press("Tab")
        reached.append(focused(page))
        assert len(reached) < 10
    for key, at in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 15), ("ArrowLeft", 14), ("Home", 0)):
        page.keyboard.press(key)
        chosen = page.locator('.token[aria-selected="true"]')
        assert chosen.count() == 1 and chosen.get_attribute("data-at") == str(at)
        assert focused(page) == "token" and page.locator('.token[tabindex="0"]').count() == 1
    assert "prefill" in page.locator("#detail").text_content()
    while focused(page) != "step":
        page.keyboard.press("Tab")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("#step-number").text_content().startswith("2 of ")


def focused(page: Any) -> str:
    element = page.locator("*:focus")
    return element.get_attribute("id") or element.get_attribute("class").split()[0]


def test_a_dropped_photo_is_shown_and_other_files_are_refused(page: Any) -> None:
    drop = """([name, kind, base64]) => {
        const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], name, { type: kind }));
        document.getElementById('drop').dispatchEvent(new DragEvent('drop', { dataTransfer: data, cancelable: true }));
    }"""
    page.click("#remove")
    page.evaluate(drop, ["a.png", "image/png", data_uri(picture(3)).split(",")[1]])
    page.wait_for_selector("#photo:visible")
    assert page.get_attribute("#image", "src") == data_uri(picture(3))
    page.evaluate(drop, ["a.pdf", "application/pdf", "YQ=="])
    page.wait_for_selector("#error:not(:empty)")
    assert "“a.pdf” is not an image or a recording" in page.locator("#error").text_content()
    assert page.get_attribute("#image", "src") == data_uri(picture(3))
    page.evaluate(drop, ["a.CSV", "text/csv", data_uri(csv(scene())).split(",")[1]])
    page.wait_for_selector("#recording:visible")
    assert page.locator("#error").text_content() == "" and page.locator("#strip .thumb").count() == 8


def test_a_recording_is_shown_frame_by_frame_beside_its_answer(page: Any, tmp_path: Path) -> None:
    stream, file = scene(), tmp_path / "a.npz"
    file.write_bytes(npz(stream))
    page.set_input_files("#file", file)
    page.wait_for_selector("#recording:visible")
    page.check("#compare")
    ask(page)
    answer = VLM.generate([event_clip(stream, 8)], "What is it?", max_new_tokens=16)
    assert page.locator("#status").text_content() == f"Answer: {answer.text}"
    assert page.locator("#tokens .token").count() == len(answer.tokens)
    assert "Both answers are identical." in page.locator("#compared").text_content()
    assert page.locator("#tree svg g.root").count() == 1
    drawn, shown = event_frames(stream, 8), []
    page.locator("#frame-at").focus()
    for number in range(1, 9):  # with the keyboard alone
        assert page.locator("#frame-number").text_content() == f"{number} of 8"
        assert f"{drawn.counts[number - 1]} events" in page.get_attribute("#frame-at", "aria-valuetext")
        assert page.locator("#strip .thumb.chosen").count() == 1
        kind, data = page.get_attribute("#image", "src").split(",")
        assert kind == "data:image/png;base64"
        shown.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").tobytes())
        page.keyboard.press("ArrowRight")
    assert shown == [image.tobytes() for image in drawn.images()]
    page.locator("#strip .thumb").nth(2).click()
    assert page.locator("#frame-number").text_content() == "3 of 8"
    assert "no events" in page.locator("#reads").text_content()  # this drafter reads none
    page.click("#measure")
    page.wait_for_selector("#go:enabled")
    assert "its largest frame" in page.locator("#map").text_content()
    shades = page.locator("#strip i").evaluate_all("all => all.map((shade) => Number(shade.style.opacity))")
    assert len(shades) == 8 and max(shades) > 0
    page.click("#remove")
    assert page.locator("#recording").is_hidden() and page.locator("#photo").is_hidden()


def test_a_recording_that_is_refused_is_removed(browser: Any, served: tuple[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    file.write_bytes(npy_dict(scene()))
    for page in opened(browser, served[0], tmp_path, refused=("Failed to load resource",)):
        page.set_input_files("#file", file)
        page.wait_for_selector("#error:not(:empty)")
        assert "recording 1: it is a pickle" in page.locator("#error").text_content()
        assert page.locator("#photo").is_hidden() and page.locator("#remove").is_hidden()


def test_errors_are_shown(browser: Any, served: tuple[str, Any], tmp_path: Path) -> None:
    for page in opened(browser, served[0], tmp_path, refused=("Failed to load resource",)):
        ask(page, "a <image> b")
        assert "'<image>'" in page.locator("#error").text_content()
        ask(page)
        assert page.locator("#error").text_content() == ""
        page.route("**/v1/chat/completions", lambda route: route.abort())
        ask(page)
        assert "the server does not answer" in page.locator("#error").text_content()
        for body, said in (
            ('data: {"error": {"message": "the answer broke"}}\n\n', "the answer broke"),
            ("data: {}", "the connection ended before the answer did"),
        ):
            answered(page, body=body)
            ask(page)
            assert page.locator("#error").text_content() == said
        busy = json.dumps({"error": {"message": "the server is busy"}})
        answered(page, status=429, headers={"retry-after": "7"}, body=busy)
        ask(page)
        assert page.locator("#error").text_content() == "the server is busy; try again in 7 s"


def answered(page: Any, **answer: Any) -> None:
    """From now on, chat completions are answered with this."""
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))


def test_a_key_is_asked_for(browser: Any, tmp_path: Path) -> None:
    with running(VLM, keys=("sesame",)) as (address, _, _):
        for page in opened(browser, address, tmp_path, refused=("Failed to load resource",)):
            page.wait_for_selector("#key:visible")
            page.fill("#key", "sesame")
            ask(page)
            assert page.locator("#tokens .token").count() == 16
            assert page.locator("#served").text_content().startswith(NAME)


def test_the_policy_blocks_other_addresses_and_inline_code(
    browser: Any, served: tuple[str, Any], tmp_path: Path
) -> None:
    for page in opened(browser, served[0], tmp_path, refused=("Fetch API", "Executing inline", "Connecting to")):
        with pytest.raises(Exception, match="Failed to fetch"):
            page.evaluate("() => fetch('http://127.0.0.1:9/')")
        page.evaluate("""() => new Promise((done) => {
            const script = document.createElement('script'), image = document.createElement('img');
            script.textContent = "document.title = 'inline'";
            image.setAttribute('onerror', "document.title = 'inline'");
            image.addEventListener('error', done);
            image.src = 'data:,';
            document.body.append(script, image);
        })""")
        assert page.title() == "MSD: an answer, step by step"


def test_the_page_says_whether_the_drafter_reads_events(page: Any, served: tuple[str, Any], tmp_path: Path) -> None:
    settings = {**httpx2.get(f"{served[0]}/v1/msd").json(), "events": True}
    page.route("**/v1/msd", lambda route: route.fulfill(body=json.dumps(settings), content_type="application/json"))
    page.reload()
    file = tmp_path / "a.npz"
    file.write_bytes(npz(scene()))
    page.wait_for_selector("#file[accept*='.npz']")
    page.set_input_files("#file", file)
    page.wait_for_selector("#recording:visible")
    assert "the drafter reads the events" in page.locator("#reads").text_content()


def test_text_from_the_model_is_never_markup(page: Any) -> None:
    step = {
        "tokens": [{"id": 5, "text": "<img src=x onerror=alert(1)>", "accepted": False, "modality": "vision"}],
        "tree": {"root": "<script>", "nodes": []}, "draft_seconds": 0.1, "pass_seconds": 0.1,
    }  # fmt: skip
    event = {"choices": [{"delta": {"content": "<b>bold</b>"}}], "msd": {"step": step}}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    answered(page, body=body, content_type="text/event-stream")
    ask(page)
    assert page.locator(".token").text_content() == "<img src=x onerror=alert(1)>"
    assert page.locator("#answer img, #answer b, #tree script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_switch(
    browser: Any, served: tuple[str, Any], tmp_path: Path, scheme: str
) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(246, 246, 244)", "dark": "rgb(21, 23, 26)"}
    for page in opened(browser, served[0], tmp_path, color_scheme=scheme):
        assert page.evaluate(ground) == colours[scheme]
        for theme in ("light", "dark"):
            page.click("#theme")
            assert page.locator("#theme").text_content() == f"Theme: {theme}"
            assert page.evaluate(ground) == colours[theme]
        page.reload()
        assert page.evaluate(ground) == colours["dark"]  # the choice is kept
        page.click("#theme")
        assert page.evaluate(ground) == colours[scheme]
        page.set_input_files("#file", tmp_path / "photo.png")
        page.fill("#most", "16")
        ask(page)
        assert len(contrasts(page)) > 30 and min(contrasts(page)) >= 4.5


def contrasts(page: Any) -> list[float]:
    """The contrast of every text on the page with the ground below it (WCAG 2.2, 1.4.3)."""
    return page.evaluate("""() => {
        const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = (node) => {
            const colour = getComputedStyle(node).backgroundColor, parts = numbers(colour);
            return parts.length === 4 && parts[3] === 0 ? ground(node.parentElement) : colour;
        };
        return [...document.querySelectorAll('body *')]
            .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
            .filter((node) => node.checkVisibility() && !node.disabled)
            .map((node) => [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a))
            .map(([more, less]) => (more + 0.05) / (less + 0.05));
    }""")


def test_a_narrow_screen_shows_everything(browser: Any, served: tuple[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    file.write_bytes(npz(scene()))
    for page in opened(browser, served[0], tmp_path, viewport={"width": 360, "height": 740}):
        page.check("#compare")
        ask(page)
        page.click("#measure")
        page.wait_for_selector("#blocks i:nth-child(16)", state="attached")
        assert wider(page, 360) == []
        page.set_input_files("#file", file)
        page.wait_for_selector("#recording:visible")
        assert wider(page, 360) == []


def wider(page: Any, width: int) -> list[str]:
    """The elements that are wider than the screen and do not scroll."""
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    return page.evaluate(
        """(width) => [...document.querySelectorAll('main *')]
        .filter((node) => !node.closest('#tree, .scrolls, .unseen') && node.getBoundingClientRect().right > width)
        .map((node) => node.id || node.tagName)""",
        width,
    )


def test_everything_has_a_name_and_little_is_announced(page: Any) -> None:
    ask(page)
    page.check("#compare")
    named = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, [role], output')]
        .filter((node) => node.checkVisibility())
        .filter((node) => !(node.labels?.length || node.ariaLabel || node.textContent.trim()
            || node.getAttribute('aria-labelledby')))
        .map((node) => node.id || node.outerHTML)""")
    assert [name for name in named if name not in ("error", "status")] == []
    live = page.evaluate("""() => [...document.querySelectorAll('[aria-live], [role=status], [role=alert]')]
        .map((node) => node.id)""")
    assert sorted(live) == ["detail", "error", "status"]
