"""The page on the real server, with the embedded Sudoku model."""

from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
from playwright.sync_api import expect

from dgemma.embedded.sudoku import rules

SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PUZZLE = "".join("." if i % 5 == 2 else digit for i, digit in enumerate(SOLVED))


def test_a_puzzle_is_solved_and_raced_for(browser: Any, site: Any) -> None:
    page = browser.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(site.url)
    expect(page.locator("#model")).to_contain_text("sudoku")
    assert page.get_by_label("Think").is_hidden()
    page.get_by_label("Message").fill(PUZZLE)
    page.get_by_role("button", name="Race").click()
    for i in range(2):
        expect(page.locator(".status").nth(i)).to_contain_text("tokens/s", timeout=20000)
    digits = [int(c) for c in page.locator(".answer > .text").first.inner_text() if c.isdigit()]
    assert rules.check(rules.parse(PUZZLE), digits) is None
    page.locator(".steps summary").first.click()
    expect(page.locator(".replay .cell")).to_have_count(90)
    assert errors == []
    page.close()


def test_a_part_is_written_again(browser: Any, site: Any) -> None:
    page = browser.new_page()
    page.goto(site.url)
    expect(page.locator("#model")).to_contain_text("sudoku")
    page.get_by_label("Message").fill(PUZZLE)
    page.get_by_label("Message").press("Enter")
    text = page.locator(".answer > .text")
    expect(page.locator(".status")).to_contain_text("tokens/s", timeout=20000)
    solution = text.inner_text()
    with page.expect_request("**/v1/chat/completions") as sent:
        text.focus()
        page.keyboard.press("ArrowRight")
        page.get_by_role("button", name="Write again").press("Enter")
    body = sent.value.post_data_json
    assert len(body["pins"]) + body["max_tokens"] == len(solution) + 1  # the end token
    expect(page.get_by_role("button", name="Undo")).to_be_visible(timeout=20000)
    assert text.inner_text() == solution
    page.close()
