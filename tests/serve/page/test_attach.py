"""Images on the page: dropped, pasted or chosen, sent before the text, and shown with the message."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
from playwright.sync_api import expect

from tests.media.test_images import noise, saved
from tests.random_models import seeing_lm
from tests.serve.conftest import Site, serving

GIVE = """([kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
    : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.getElementById("input").dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def seeing() -> Iterator[Site]:
    with serving(seeing_lm()) as site:
        yield site


@pytest.fixture
def page(browser: Any, seeing: Site) -> Iterator[Any]:
    page = browser.new_page()
    page.errors = []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    # One seed: with another, random weights may answer nothing, and a turn without an answer is not kept.
    page.add_init_script("crypto.getRandomValues = (array) => array.fill(7)")
    page.goto(seeing.url)
    expect(page.locator("#attach")).to_be_visible()
    yield page
    assert page.errors == []
    page.close()


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_a_file_goes_along_before_the_text(page: Any, way: str, tmp_path: Path) -> None:
    data = saved(noise(60, 40))
    if way == "choose":
        (tmp_path / "a.png").write_bytes(data)
        page.locator("#file").set_input_files(tmp_path / "a.png")
    else:
        page.evaluate(GIVE, [way, base64.b64encode(data).decode()])
    expect(page.locator("#shown img")).to_have_count(1)
    page.get_by_label("Message").fill("the cat")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_label("Message").press("Enter")
    parts = sent.value.post_data_json["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"]
    assert base64.b64decode(parts[0]["image_url"]["url"].partition(",")[2]) == data
    expect(page.locator(".status")).to_contain_text("tokens/s", timeout=20000)
    expect(page.locator(".ask img")).to_have_count(1)
    expect(page.locator("#shown img")).to_have_count(0)
    with page.expect_request("**/v1/chat/completions") as again:
        page.get_by_label("Message").fill("and?")
        page.get_by_label("Message").press("Enter")
    assert again.value.post_data_json["messages"][0]["content"] == parts


def test_a_file_can_be_taken_away_and_others_are_refused(page: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(noise(60, 40)))
    (tmp_path / "a.txt").write_text("text")
    page.locator("#file").set_input_files([tmp_path / "a.png", tmp_path / "a.txt"])
    expect(page.locator("#notice")).to_contain_text("a.txt is neither an image nor a video")
    page.get_by_role("button", name="Remove a.png").click()
    expect(page.locator("#shown")).to_be_hidden()


def test_a_large_photo_is_made_smaller(page: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(noise(2500, 1000)))
    page.locator("#file").set_input_files(tmp_path / "a.png")
    expect(page.locator("#shown img")).to_have_count(1)
    page.get_by_label("Message").fill("the cat")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_label("Message").press("Enter")
    url = sent.value.post_data_json["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    expect(page.locator(".status")).to_contain_text("tokens/s", timeout=20000)


def test_a_model_without_a_tower_offers_no_images(browser: Any, site: Site) -> None:
    page = browser.new_page()
    page.goto(site.url)
    expect(page.locator("#model")).to_contain_text("sudoku")
    assert page.locator("#attach").is_hidden()
    page.evaluate(GIVE, ["paste", base64.b64encode(saved(noise(6, 4))).decode()])
    expect(page.locator("#notice")).to_contain_text("takes no images")
    page.close()
