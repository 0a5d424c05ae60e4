"""The page in a real browser, against a real server with an engine that has no model.

Chromium and the server run in a network namespace with the loopback only, where the user may make
one; the browser's requests are checked in any case. Debian: `apt-get install chromium`, and the
extra `browser`.
"""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from helpers import offline
from helpers.fake_engine import SIZE, FakeEngine, listening, serving, wait_for
from PIL import Image

from janusflow_jax.data import image_files
from janusflow_jax.serve import app, command, page as page_files
from janusflow_jax.serve.engine import Engine
from janusflow_jax.serve.requests import ChatRequest, ImageRequest

try:
    from playwright.sync_api import Error, expect, sync_playwright
except ImportError:
    sync_playwright = None

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(
    sync_playwright is None or CHROMIUM is None, reason="needs the extra `browser`, and Chromium"
)
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",  # a container may have little of it
]


def test_files_hold_nothing_that_the_policy_forbids():
    total = 0
    for name, (body, _) in page_files.FILES.items():
        text = body.decode()
        total += len(body)
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, name
        assert "innerHTML" not in text and "eval(" not in text, name
    html = page_files.FILES["index.html"][0].decode()
    assert "style=" not in html and "<style" not in html and " on" + "click" not in html
    assert html.count("<script") == html.count('<script type="module" src="page.js">') == 1
    assert total < 60_000
    policy = page_files.HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy


@pytest.fixture(scope="module")
def browser():
    with offline.network(), sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        except Error as error:
            pytest.skip(f"Chromium does not start on this machine: {error}")
        yield chromium
        chromium.close()


class Visit:
    """A page of a server, and what it did that it must not do."""

    def __init__(self, browser, url, engine, **options):
        options = {"viewport": {"width": 1100, "height": 900}, **options}
        self.context = browser.new_context(permissions=["clipboard-write"], **options)
        self.page, self.engine = self.context.new_page(), engine
        self.foreign, self.errors = [], []
        allowed = (url, "data:", "blob:")
        self.page.on("request", lambda r: r.url.startswith(allowed) or self.foreign.append(r.url))
        self.page.on("console", lambda m: m.type != "error" or self.errors.append(m.text))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(url)

    def button(self, name, **options):
        return self.page.get_by_role("button", name=name, exact=True, **options)

    def field(self, name):
        return self.page.get_by_label(name, exact=True).locator("visible=true")

    def status(self):
        return self.page.locator("#status")

    def generate(self, prompt, **fields):
        self.field("Prompt").fill(prompt)
        for name, value in fields.items():
            self.field(name).fill(str(value))
        self.button("Generate").click()

    def say(self, text):
        self.field("Message").fill(text)
        self.button("Send").click()

    def answers(self):
        return self.page.locator(".turn.assistant[aria-busy=false] .text")

    def images(self):
        return [x for x in self.engine.seen if isinstance(x, ImageRequest)]

    def chats(self):
        return [x for x in self.engine.seen if isinstance(x, ChatRequest)]


@pytest.fixture
def visit(browser):
    """Opens the page of a new server."""
    visits, servers = [], []

    def open_page(step=0.0, keys=(), max_queue=16, **options):
        engine = FakeEngine(step=step, max_queue=max_queue)
        server = serving(engine, keys=keys)
        servers.append(server)
        out = Visit(browser, server.__enter__(), engine, **options)
        visits.append(out)
        if not keys:
            expect(out.page.get_by_text("fake · 32 × 32 pixels · float32")).to_be_visible()
        return out

    yield open_page
    for out in visits:
        out.context.close()
    for server in servers:
        server.__exit__(None, None, None)
    for out in visits:
        assert not out.foreign and not out.errors, (out.foreign, out.errors)


def png(color, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def upload(data, name="photo.png"):
    return {"name": name, "mimeType": "image/png", "buffer": data}


def drop(page, data, name="photo.png", event="drop"):
    """What the browser sends when a person drops or pastes a file."""
    kind, attribute = ("DragEvent", "dataTransfer") if event == "drop" else ("ClipboardEvent", "")
    page.evaluate(
        """([kind, event, attribute, data, name]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (x) => x.charCodeAt(0));
            transfer.items.add(new File([bytes], name, {type: "image/png"}));
            const options = {bubbles: true, [attribute || "clipboardData"]: transfer};
            document.body.dispatchEvent(new globalThis[kind](event, options));
        }""",
        [kind, event, attribute, base64.b64encode(data).decode(), name],
    )


def pixels_shown(visit, locator):
    url = locator.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


@pytest.mark.slow
@in_a_browser
def test_images_with_previews_seeds_and_a_gallery(visit):
    v = visit(step=0.05)
    v.button("a red apple").click()
    v.generate("a red <b>apple</b>", Images=2, Steps=8, Guidance=3.5)
    previews = v.page.locator("figure.working .way img")
    expect(previews).not_to_have_count(0)
    expect(v.page.locator("progress").first).to_be_visible()
    expect(v.status()).to_contain_text("Done in", timeout=20_000)
    cards = v.page.locator("figure.done")
    expect(cards).to_have_count(2)
    expect(v.page.locator("figure.done .way img")).to_have_count(6)
    (request,) = v.images()
    assert (request.prompt, request.sampler.steps) == ("a red <b>apple</b>", 8)
    assert (request.guidance_scale, request.previews, len(request.seeds)) == (3.5, 3, 2)
    for i, seed in enumerate(request.seeds):
        image = cards.nth(i).locator(".frame img")
        expect(cards.nth(i)).to_contain_text(f"Seed {seed}")
        np.testing.assert_array_equal(pixels_shown(v, image), FakeEngine.pixels(seed))
    assert v.field("Seed").input_value() == str(request.seeds[0])
    expect(v.page.locator(".run h3")).to_have_text("a red <b>apple</b>")  # text, not markup

    v.field("New seed each time").uncheck()
    v.button("Generate").click()
    expect(v.page.locator(".run")).to_have_count(2)
    expect(cards).to_have_count(4, timeout=20_000)
    assert v.images()[1].seeds == request.seeds
    cards.first.locator(".frame").click()
    expect(v.page.locator("#viewer")).to_be_visible()
    v.page.keyboard.press("Escape")
    v.button("Clear").click()
    expect(cards).to_have_count(0)


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(
    ("what", "values", "titles"),
    [
        (
            "Guidance",
            [1.0, 2.0, 4.0, 8.0],
            ["Guidance 1", "Guidance 2", "Guidance 4", "Guidance 8"],
        ),
        ("Steps", [5, 10, 20, 50], ["5 steps", "10 steps", "20 steps", "50 steps"]),
    ],
)
def test_comparing_on_one_seed(visit, what, values, titles):
    v = visit(step=0.01, max_queue=1)  # a public server lets few requests wait
    v.page.get_by_role("radio", name=f"By {what.lower()}").check()
    expect(v.field("Images")).to_be_disabled()
    v.generate("a whale")
    expect(v.status()).to_contain_text("Done in", timeout=20_000)
    assert v.page.locator("figure.done figcaption").all_text_contents() == titles
    requests = v.images()
    assert len({x.seeds for x in requests}) == 1 and len(requests[0].seeds) == 1
    sent = [x.guidance_scale if what == "Guidance" else x.sampler.steps for x in requests]
    assert sent == values

    v.field("Values").fill("1, x")
    v.button("Generate").click()
    message = v.field("Values").evaluate("(field) => field.validationMessage")
    assert message.startswith("Expected numbers from 1 to") and len(v.images()) == 4


@pytest.mark.slow
@in_a_browser
def test_stop_ends_the_work_and_keeps_previews(visit):
    v = visit(step=0.05)
    v.generate("a whale", Images=3, Steps=20)
    expect(v.page.locator("figure.working .way img").first).to_be_visible()
    v.button("Stop").last.click()
    expect(v.status()).to_have_text("Stopped.")
    wait_for(lambda: v.engine.counters["failed_cancelled"] == 1)
    stopped = v.page.locator("figure.stopped")
    expect(stopped).to_have_count(1)  # those without a preview are gone
    expect(stopped).to_contain_text("stopped")
    expect(v.button("Stop")).to_be_disabled()
    v.generate("a whale", Images=1, Steps=2)
    expect(v.status()).to_contain_text("Done in")


@pytest.mark.slow
@in_a_browser
def test_a_saved_png_restores_its_settings(visit, tmp_path):
    v = visit()
    prompt = "a grüner apple, 苹果"
    v.generate(prompt, Images=1, Steps=7, Guidance=2.5)
    expect(v.page.locator("figure.done")).to_have_count(1)
    with v.page.expect_download() as download:
        v.page.get_by_role("link", name="Save").click()
    path = tmp_path / "saved.png"
    download.value.save_as(path)
    seed = v.images()[0].seeds[0]
    assert download.value.suggested_filename == f"janusflow-{seed}.png"
    saved = json.loads(Image.open(path).text["janusflow_jax"])
    assert (saved["prompt"], saved["seed"]) == (prompt, seed)

    def restored():
        names = ("Prompt", "Steps", "Guidance", "Seed", "Images")
        return [v.field(name).input_value() for name in names]

    want = [prompt, "7", "2.5", str(seed), "1"]
    for restore in (
        lambda: drop(v.page, path.read_bytes(), "saved.png"),
        lambda: drop(v.page, path.read_bytes(), "saved.png", event="paste"),
        lambda: v.field("Restore settings from a PNG").set_input_files(path),
    ):
        v.page.reload()
        expect(v.page.get_by_text("fake ·")).to_be_visible()
        restore()
        expect(v.status()).to_contain_text("restored")
        assert restored() == want and not v.field("New seed each time").is_checked()
    v.button("Generate").click()
    expect(v.page.locator("figure.done")).to_have_count(1)
    assert v.images()[-1].seeds == (seed,) and v.images()[-1].prompt == prompt

    more = {"order": 2, "shift": 3.0, "strength": 0.5, "model": "other"}
    other = image_files.encode(np.zeros((8, 8, 3), np.uint8), {**saved, **more})
    v.field("Restore settings from a PNG").set_input_files(upload(other))
    expect(v.status()).to_have_text(
        "Settings of photo.png restored. This page has no field for its order and shift. "
        "It started from another image. Its model: other."
    )

    v.field("Restore settings from a PNG").set_input_files(upload(png("red")))
    expect(v.status()).to_have_text(
        "photo.png holds no settings of an image that was generated here."
    )
    for broken in (b"", b"\x89PNG\r\n\x1a\n", path.read_bytes()[:60]):
        v.field("Restore settings from a PNG").set_input_files(upload(broken, "broken.png"))
        expect(v.status()).to_contain_text("broken.png holds no settings")


@pytest.mark.slow
@in_a_browser
def test_asking_about_an_image_in_a_conversation(visit):
    v = visit(step=0.03)
    v.generate("a whale", Images=1, Steps=1)
    v.button("Ask about it").click()
    expect(v.field("Message")).to_be_focused()
    words = "What is in this picture, and where is it from?"
    v.say(words)
    expect(v.page.locator(".turn.assistant[aria-busy=true] .text")).to_contain_text("What is")
    expect(v.answers()).to_have_text([f"{words} [1 images]"])
    expect(v.page.locator(".turn.assistant .meta")).to_contain_text("11 tokens")
    np.testing.assert_array_equal(v.chats()[0].images[0].shape, (SIZE, SIZE, 3))

    # A second turn: more images from a file, a drop and a paste; one is removed again.
    v.field("Attach images").set_input_files([upload(png("red")), upload(png("green"), "b.png")])
    pending = v.page.locator("#pending img")
    expect(pending).to_have_count(2)
    drop(v.page, png("blue"), "c.png")
    expect(pending).to_have_count(3)
    drop(v.page, png("white"), "d.png", event="paste")
    expect(pending).to_have_count(4)
    v.button("Remove image 2").click()
    expect(pending).to_have_count(3)
    drop(v.page, b"no image", "notes.png")
    expect(v.page.locator("#chat-status")).to_have_text(
        "notes.png is not an image that this browser can read."
    )
    v.field("Message").fill("And these?")
    v.page.keyboard.press("Enter")
    expect(v.answers()).to_have_count(2, timeout=10_000)
    second = v.chats()[1]
    assert [x["role"] for x in second.messages] == ["user", "assistant", "user"]
    colors = [tuple(image[image.shape[0] // 2, image.shape[1] // 2]) for image in second.images[1:]]
    assert colors == [(255, 0, 0), (0, 0, 255), (255, 255, 255)]

    v.button("Generate from this answer").last.click()
    assert v.field("Prompt").input_value() == "And these? [4 images]"
    v.page.get_by_role("tab", name="Chat").click()
    v.button("New conversation").click()
    expect(v.page.locator(".turn")).to_have_count(0)
    v.field("Message").fill("line 1")
    v.page.keyboard.press("Shift+Enter")
    v.page.keyboard.type("line 2")
    v.button("Send").click()
    expect(v.answers()).to_have_count(1)
    assert len(v.chats()[2].messages) == 1


@pytest.mark.slow
@in_a_browser
def test_settings_of_a_conversation(visit):
    v = visit()
    v.page.get_by_role("tab", name="Chat").click()
    v.page.get_by_text("Settings", exact=True).click()
    values = {"Temperature": "0.5", "Top p": "0.9", "Seed": "7", "Max tokens": "2"}
    for name, value in values.items():
        v.page.locator("#chat").get_by_label(name, exact=True).fill(value)
    v.field("System prompt").fill("Be brief.")
    v.say("one two three")
    expect(v.answers()).to_have_text(["one two"])
    expect(v.page.locator(".turn.assistant .meta")).to_contain_text("cut at the longest answer")
    (chat,) = v.chats()
    assert (chat.temperature, chat.top_p, chat.seed, chat.max_tokens) == (0.5, 0.9, 7, 2)
    assert chat.messages[0] == {"role": "system", "content": ["Be brief."]}

    settings = v.page.locator("#chat-settings")
    v.field("Temperature").fill("9")
    v.page.get_by_text("Settings", exact=True).click()
    expect(settings).not_to_have_attribute("open", "")
    v.say("four")
    expect(settings).to_have_attribute("open", "")  # to show what is wrong
    assert len(v.chats()) == 1
    v.errors.clear()  # Chromium logs a field that it could not focus at once


@pytest.mark.slow
@in_a_browser
def test_stopping_an_answer_keeps_what_is_there(visit):
    v = visit(step=0.1)
    v.page.get_by_role("tab", name="Chat").click()
    v.say("one two three four five six seven eight nine ten")
    expect(v.page.locator(".turn.assistant .text")).to_contain_text("one two")
    v.page.locator("#chat-stop").click()
    expect(v.page.locator(".turn.assistant .meta")).to_contain_text("stopped")
    wait_for(lambda: v.engine.counters["failed_cancelled"] == 1)
    v.say("go on")
    expect(v.answers()).to_have_count(2)
    assert [x["role"] for x in v.chats()[1].messages] == ["user", "assistant", "user"]
    assert v.chats()[1].messages[1]["content"][0].startswith("one two")

    # Stopped before the first word: the message is there to be changed.
    v.button("New conversation").click()
    v.say("hold on")
    v.page.locator("#chat-stop").click()
    expect(v.page.locator(".turn")).to_have_count(0)
    assert v.field("Message").input_value() == "hold on"


@pytest.mark.slow
@in_a_browser
def test_starting_from_an_image_and_a_drawn_area(visit):
    v = visit()
    v.generate("a whale", Images=1, Steps=2)
    v.button("Vary").click()
    expect(v.page.get_by_role("group", name="Start image")).to_be_visible()
    v.field("Strength").fill("0.4")
    v.generate("a red whale")
    expect(v.page.locator("figure.done")).to_have_count(2)
    first, second = v.images()
    assert first.image is None and (second.strength, second.mask) == (0.4, None)
    np.testing.assert_array_equal(second.image, FakeEngine.pixels(first.seeds[0]))

    drop(v.page, png("red", (60, 40)))  # without settings: the new start
    expect(v.status()).to_have_text("The next images start from photo.png.")
    v.field("Only the area that I draw").check()
    v.page.locator("#mask").scroll_into_view_if_needed()
    box = v.page.locator("#mask").bounding_box()
    v.page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    v.page.mouse.down()
    v.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4, steps=4)
    v.page.mouse.up()
    v.button("Generate").click()
    expect(v.page.locator("figure.done")).to_have_count(3)
    drawn = v.images()[2]
    assert drawn.strength == 1.0 and (drawn.image[..., 0] > 250).all()
    at = SIZE // 4
    assert drawn.mask[at, at] and drawn.mask[at, SIZE * 3 // 8]
    assert not drawn.mask[SIZE * 3 // 4].any() and not drawn.mask[:, -1].any()

    half = np.zeros((40, 40, 3), np.uint8)
    half[:, 20:] = 255
    file = io.BytesIO()
    Image.fromarray(half).save(file, "PNG")
    v.button("Clear drawing").click()
    v.field("Or a mask image (white: generate again)").set_input_files(upload(file.getvalue()))
    v.button("Generate").click()
    expect(v.page.locator("figure.done")).to_have_count(4)
    mask = v.images()[3].mask
    assert mask[:, SIZE // 2 + 1 :].all() and not mask[:, : SIZE // 2 - 1].any()

    v.button("Remove start image").click()
    v.button("Generate").click()
    expect(v.page.locator("figure.done")).to_have_count(5)
    assert v.images()[4].image is None


@pytest.mark.slow
@in_a_browser
def test_errors_are_the_servers_sentences(visit):
    v = visit()
    v.generate("too long")
    expect(v.status()).to_contain_text("expected at most 64 positions")
    expect(v.status()).to_have_class("status error")
    expect(v.page.locator(".run")).to_have_count(0)
    v.generate("fail not_finite")
    expect(v.status()).to_have_text("it failed")
    v.page.get_by_role("tab", name="Chat").click()
    v.page.evaluate("sessionStorage.setItem('key', 'x')")
    v.page.route("**/v1/chat/completions", lambda route: route.abort())
    v.say("hello")
    expect(v.page.locator("#chat-status")).to_contain_text("The server cannot be reached")
    assert v.field("Message").input_value() == "hello"
    # The browser itself logs answers that are errors.
    assert all("Failed to load resource" in text for text in v.errors)
    v.errors.clear()


@pytest.mark.slow
@in_a_browser
def test_a_server_with_a_key(visit):
    v = visit(keys=["secret"])
    dialog = v.page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    v.field("Key").fill("wrong")
    v.button("Use it").click()
    expect(dialog).to_be_visible()
    v.field("Key").fill("secret")
    v.page.keyboard.press("Enter")
    expect(v.page.get_by_text("fake ·")).to_be_visible()
    v.generate("a whale", Images=1, Steps=1)
    expect(v.page.locator("figure.done")).to_have_count(1)
    assert all("Failed to load resource" in text for text in v.errors)
    v.errors.clear()


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_it_fits(visit, width, scheme, tmp_path):
    """Nothing is cut or scrolls sideways; the pictures are for a person to look at."""
    v = visit(viewport={"width": width, "height": 740}, color_scheme=scheme)

    def check(name):
        assert v.page.evaluate("document.documentElement.scrollWidth") <= width
        v.page.screenshot(path=tmp_path / f"{name}.png", full_page=True)

    check("start")
    v.generate("a whale " + "w" * 80, Images=3)
    expect(v.status()).to_contain_text("Done in", timeout=20_000)
    v.page.get_by_role("radio", name="By guidance").check()
    v.button("Generate").click()
    expect(v.page.locator("figure.done")).to_have_count(7)
    v.button("Vary").first.click()
    check("generate")
    v.button("Ask about it").first.click()
    v.say("What is it? " + "w" * 80)
    expect(v.answers()).to_have_count(1)
    v.page.get_by_text("Settings", exact=True).click()
    check("chat")


@pytest.mark.slow
@in_a_browser
def test_keyboard_and_names_for_screen_readers(visit):
    v = visit()
    v.page.keyboard.press("Tab")
    expect(v.page.get_by_role("tab", name="Generate")).to_be_focused()
    v.page.keyboard.press("ArrowRight")
    expect(v.page.get_by_role("tab", name="Chat", selected=True)).to_be_focused()
    expect(v.page.get_by_role("tabpanel", name="Chat")).to_be_visible()
    v.page.keyboard.press("ArrowLeft")
    v.page.keyboard.press("Tab")
    expect(v.field("Prompt")).to_be_focused()
    v.page.keyboard.type("a whale")
    v.page.keyboard.press("Control+Enter")
    expect(v.status()).to_contain_text("Done in")
    reached = set()
    for _ in range(40):
        v.page.keyboard.press("Tab")
        reached.add(v.page.evaluate("document.activeElement.textContent.trim()"))
    assert {"Generate", "Save", "Ask about it", "Vary", "Reuse", "Clear"} <= reached
    v.button("Ask about it").first.click()
    v.say("What is it?")
    expect(v.answers()).to_have_count(1)
    nameless = v.page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, textarea, img, canvas")]
            .filter((x) => !(x.labels?.length || x.getAttribute("aria-label")
                || x.textContent.trim() || x.hasAttribute("alt")))
            .map((x) => x.outerHTML.slice(0, 80))"""
    )
    assert not nameless
    ids = v.page.evaluate("[...document.querySelectorAll('[id]')].map((x) => x.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.slow
@in_a_browser
def test_the_engine_of_the_golden_model(browser, golden_folder, golden_model):
    """The images and words of the pipeline, on the page."""
    sizes = "--rows 4 --lanes 2 --context 192 --prompt-tokens 32".split()
    args = command.parse(["--model", str(golden_folder), *sizes])
    settings, limits, _ = command.check(args)
    engine = Engine(golden_model, settings)
    server = app.Server(engine, command.serve_model(golden_model, engine, args), limits)
    with listening(server) as url:
        v = Visit(browser, url, None)
        v.generate("a red fox", Images=2, Steps=4)
        done = v.page.locator("figure.done")
        expect(done).to_have_count(2, timeout=60_000)
        expect(v.page.locator("figure.done .way img")).to_have_count(6)
        seed = int(v.field("Seed").input_value())
        want = golden_model.generate("a red fox", images_per_prompt=2, seed=seed, num_steps=4)
        for i, image in enumerate(want):
            shown = pixels_shown(v, done.nth(i).locator(".frame img")).astype(int)
            assert np.abs(shown - np.asarray(image)).max() <= 1
        v.button("Ask about it").first.click()
        v.page.get_by_text("Settings", exact=True).click()
        v.field("Max tokens").fill("6")
        v.say("What is it?")
        expect(v.answers()).to_have_count(1, timeout=60_000)
        first = pixels_shown(v, done.first.locator(".frame img"))
        answer = golden_model.chat("What is it?", [first], max_new_tokens=6)
        assert v.answers().first.text_content() == answer
        v.context.close()
        assert not v.foreign and not v.errors
