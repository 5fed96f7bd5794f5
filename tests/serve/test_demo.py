"""The chat page: what its files may do, and a person's way through it in a real browser."""

import base64
import io
import json
import re
import shutil
import time

import pytest
from PIL import Image

from llava_jax.serve.demo import files
from tests.serve.conftest import KEY, NAME, picture, shown

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome")
                 if (p := shutil.which(n))), None)  # fmt: skip
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


def test_the_page_is_open_and_strict(server):
    for path, (content, kind) in files().items():
        reply = server.http.get(path, headers={"Authorization": ""})
        assert (reply.status_code, reply.content) == (200, content)
        assert reply.headers["content-type"] == kind
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert KEY.encode() not in content
    assert server.http.get("/demo/page.html").status_code == 404
    assert server.http.get("/demo/../demo.py").status_code == 404
    refused = server.http.post("/demo/seen", json={"url": "a"}, headers={"Authorization": ""})
    assert refused.status_code == 401


def test_nothing_makes_markup_of_text_or_names_another_host():
    for path, (content, kind) in files().items():
        if "png" in kind:
            continue
        text = content.decode()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "style=",
        ):
            assert word not in text, (path, word)
        assert not re.findall(r"https?://", text), path
        assert not re.findall(r"\son\w+=", text), path


def test_the_picture_as_the_model_sees_it(server):
    wide = Image.new("RGB", (40, 20), "red")
    file = io.BytesIO()
    wide.save(file, "PNG")
    reply = server.post(shown(file.getvalue())["image_url"], "/demo/seen").json()
    png = base64.b64decode(reply["url"].removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(png))
    assert image.size == (reply["side"],) * 2
    want = server.worker.model.pixels(file.getvalue())
    assert image.tobytes() == want.tobytes()
    refused = server.post({"url": "/etc/passwd"}, "/demo/seen")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "image_bad_data_uri")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    api = pytest.importorskip("playwright.sync_api", reason="pip install 'llava_jax[browser]'")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with api.sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield made
        made.close()


def said_wrong(message) -> bool:
    """Whether the browser complains, of something other than a refusal that the page shows."""
    refusal = message.text.startswith("Failed to load resource")
    return message.type in ("error", "warning") and not refusal


@pytest.fixture(params=SIZES)
def page(request, browser, server):
    """The page, opened by its link; what it complains about or asks elsewhere is an error."""
    width, height = SIZES[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, accept_downloads=True
    )
    page, wrong = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda m: said_wrong(m) and wrong.append(m.text))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on(
        "request", lambda r: r.url.startswith((server.url, "data:", "blob:")) or wrong.append(r.url)
    )
    page.goto(f"{server.url}/#key={KEY}")
    until(page, "document.querySelector('#state').textContent === 'ready'")
    yield page
    context.close()
    assert not wrong


def until(page, true: str) -> None:
    """Waits for it; not wait_for_function, which the page's own policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(true):
        assert time.monotonic() < end, true
        time.sleep(0.02)


def answered(page, number: int) -> str:
    """The text of the number-th answer, once it has ended."""
    turn = page.locator(".turn.assistant:not(.running)").nth(number - 1)
    turn.locator("button").first.wait_for()
    return turn.locator(".words").inner_text()


def export(page, kind: str) -> str:
    page.click("#export")
    with page.expect_download() as got:
        page.click(f"#saving button[value={kind}]")
    with open(got.value.path(), encoding="utf-8") as file:
        return file.read()


def test_a_conversation_in_a_browser(page, server, monkeypatch, tmp_path):
    assert page.evaluate("location.hash") == ""  # the key is not left in the address bar
    assert page.inner_text("#model") == NAME
    names = []
    for color in ("red", "blue"):
        names.append(tmp_path / f"{color}.png")
        names[-1].write_bytes(picture(color))
    page.set_input_files("#file", names)
    page.wait_for_selector("#pictures li:nth-child(2) img")
    page.fill("#text", "What color is the circle?")
    page.keyboard.press("Enter")
    first = answered(page, 1)
    content = [shown(picture(c)) for c in ("red", "blue")]
    content.append({"type": "text", "text": "What color is the circle?"})
    assert first == server.chat(content, max_tokens=512).choices[0].message.content
    line = page.locator(".turn.assistant .line").inner_text()
    assert re.search(r"\d+ tokens\s+prompt \d+", line), line

    page.click(".shown li:nth-child(2) .shot")  # as the model sees it
    until(page, "document.querySelector('#seen').naturalWidth > 0")
    page.click("#viewer button")

    page.click(".turn.assistant button:has-text('Regenerate')")
    assert answered(page, 1) == first  # at temperature 0
    assert page.locator(".turn").count() == 2

    engine, model = server.worker.engine, server.worker.model
    with monkeypatch.context() as slow:  # an answer that takes its time
        step, job = engine.step, model.job
        slow.setattr(engine, "step", lambda: (time.sleep(0.05), step())[1])
        endless = {"bias": dict.fromkeys(engine.generator.eos_ids, -100.0)}
        slow.setattr(model, "job", lambda *a, **k: vars(j := job(*a, **k)).update(endless) or j)
        page.fill("#text", "Describe the <b>picture</b>.")
        page.click("#send")
        until(page, "document.querySelectorAll('.words')[3]?.textContent.length > 3")
        page.click("#stop")
        partial = answered(page, 2)
        assert "stopped" in page.locator(".turn.assistant").nth(1).inner_text()
        while engine.busy:  # its slot is free
            time.sleep(0.02)

    told = json.loads(export(page, "json"))
    assert [m["role"] for m in told["messages"]] == ["user", "assistant"] * 2
    assert told["messages"][3]["content"] == partial
    assert len(told["messages"][0]["content"]) == 3
    assert told["answers"][0]["usage"]["completion_tokens"] > 0
    words = export(page, "md")
    assert words.count("data:image/png;base64,") == 2
    assert "<b>picture</b>" in words

    page.locator(".turn.user button:has-text('Edit')").first.click()
    page.click("#pictures li:nth-child(2) .off")
    page.fill("#text", "Which shape is it?")
    page.click("#send")
    content = [shown(picture("red")), {"type": "text", "text": "Which shape is it?"}]
    assert answered(page, 1) == server.chat(content, max_tokens=512).choices[0].message.content
    assert page.locator(".turn").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


PASTE = """async (url) => {
  const blob = await (await fetch(url)).blob(), transfer = new DataTransfer();
  transfer.items.add(new File([blob], 'shot.png', { type: 'image/png' }));
  document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true }));
  document.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


def test_pictures_from_clipboard_drop_and_camera_settings_and_refusals(page):
    page.evaluate(PASTE, "/demo/shapes-1.png")
    page.wait_for_selector("#pictures li:nth-child(2)")
    page.click("#camera")
    until(page, "document.querySelector('#video').videoWidth > 0")
    page.click("#shoot")
    page.wait_for_selector("#pictures li:nth-child(3) img")
    for _ in range(3):
        page.locator("#pictures .off").first.click()
    before = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != before

    phone = page.viewport_size["width"] < 860
    if phone:
        page.click("#settings-button")
    page.fill("#system", "Be brief.")
    page.fill("#length", "1")
    if phone:
        page.click("#settings-button")
    page.locator("#examples button").first.click()
    answered(page, 1)
    assert "cut off" in page.locator(".turn.assistant .line").inner_text()
    assert json.loads(export(page, "json"))["messages"][0] == {
        "role": "system",
        "content": "Be brief.",
    }
    page.click("#new")
    assert page.locator(".turn").count() == 0
    page.fill("#text", "word " * 20_000)
    page.click("#send")
    page.wait_for_selector(".turn .bad:has-text('characters')")
