"""Parts of an answer that are selected and written again. The server is scripted (conftest.py)."""

from threading import Semaphore
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
from playwright.sync_api import expect

from .conftest import ANSWER, CANVAS, STEPS, Script, tokens_of
from .test_page import answered, ask, settle

WORDS = tokens_of(ANSWER)
FIRST, END = 2, 4  # the tokens " of noise"
NEW = "".join(f" new{i}" if FIRST <= i < END else word for i, word in enumerate(WORDS))
SPOT = """([text, from, to]) => {
    const range = document.createRange();
    const spot = place => {
        for (const node of text.childNodes) {
            if (place <= node.length) return [node, place];
            place -= node.length;
        }
    };
    range.setStart(...spot(from));
    range.setEnd(...spot(to));
    const { left, right, top, bottom } = range.getBoundingClientRect();
    return [left + 1, right - 1, (top + bottom) / 2];
}"""


def drag(page: Any, answer: Any, words: str) -> None:
    """Selects words of an answer's text, on one line, with the mouse."""
    text = answer.locator("> .text")
    begin = text.inner_text().index(words)
    left, right, middle = page.evaluate(SPOT, [text.element_handle(), begin, begin + len(words)])
    page.evaluate("getSelection().empty()")  # else the selected text itself would be dragged
    page.mouse.move(left, middle)
    page.mouse.down()
    page.mouse.move(right, middle, steps=3)
    page.mouse.up()


def again(page: Any) -> Any:
    return page.get_by_role("button", name="Write again")


def rewritten(page: Any) -> Any:
    answer = page.locator(".answer").last
    expect(answer.locator("> .text")).to_have_text(NEW)
    expect(answer.get_by_role("button", name="Undo")).to_be_visible()
    return answer


def test_the_rest_is_pinned_and_undo_brings_it_back(page: Any, script: Script) -> None:
    answer = answered(page)
    drag(page, answer, "of nois")
    expect(page.get_by_role("toolbar")).to_contain_text("2 tokens")
    again(page).click()
    answer = rewritten(page)
    first, second = script.bodies
    assert second["messages"] == first["messages"]
    assert second["pins"] == {str(i): 100 + i for i in range(len(WORDS)) if not FIRST <= i < END}
    assert second["max_tokens"] == END - FIRST
    assert (second["draft"], second["stream"]) == (True, True)
    assert not {"noise_level", "vllm_xargs"} & second.keys()
    expect(page.get_by_role("toolbar")).to_be_hidden()
    answer.get_by_role("button", name="Undo").click()
    expect(page.locator(".answer > .text")).to_have_text(ANSWER)
    assert page.get_by_role("button", name="Undo").count() == 0
    page.get_by_text("Steps", exact=True).click()  # of the former answer, still there
    expect(page.locator(".replay .cell")).to_have_count(CANVAS)
    assert page.errors == []


def test_kept_and_new_places_are_told_apart(page: Any, script: Script) -> None:
    answer = answered(page)
    drag(page, answer, "of noise")
    script.gate = Semaphore(0)
    again(page).click()
    cells = page.locator(".answer > .canvas .cell")
    expect(cells).to_have_count(CANVAS)
    pinned = [i for i in range(CANVAS) if "pinned" in cells.nth(i).get_attribute("class")]
    assert pinned == [i for i in range(CANVAS) if not FIRST <= i < END]
    assert cells.nth(0).get_attribute("aria-description") == "kept"
    assert cells.nth(FIRST).get_attribute("aria-description") is None
    assert page.locator("#legend .pinned").inner_text() == "kept"
    script.gate.release(2 * STEPS)
    answer = rewritten(page)
    answer.get_by_text("Steps", exact=True).click()
    answer.get_by_label("Block", exact=True).select_option("0")
    for _ in range(STEPS - 1):
        answer.get_by_label("Step", exact=True).press("ArrowLeft")
    assert answer.locator(".replay .pinned").count() == CANVAS - (END - FIRST)
    assert answer.locator(".replay .cell").nth(FIRST).inner_text() == " ?1"
    answer.locator(".replay .cell").first.hover()
    expect(page.locator("#history tbody")).to_contain_text("kept")
    answer.get_by_label("Block", exact=True).select_option("1")
    assert answer.locator(".replay .cell:not(.pinned)").count() == 2 * CANVAS - len(WORDS)


def test_by_keyboard_alone(page: Any, script: Script) -> None:
    answered(page)
    for _ in range(9):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('text')"):
            break
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Control+Shift+ArrowRight")
    assert page.evaluate("getSelection().toString().trim()") == "of noise"
    expect(again(page)).to_be_visible()
    page.keyboard.press("Tab")
    expect(again(page)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("toolbar")).to_be_hidden()
    assert page.evaluate("getSelection().toString()") == ""
    page.keyboard.press("ArrowRight")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Control+Shift+ArrowRight")
    expect(page.get_by_role("toolbar")).to_contain_text("2 tokens")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    rewritten(page)
    assert page.evaluate("document.activeElement.className") == "text"
    for name in ("Copy", "Undo"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name=name)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".answer > .text")).to_have_text(ANSWER)


@pytest.mark.parametrize("status", [400, 409])
def test_a_refusal_is_shown_and_leaves_the_answer(page: Any, script: Script, status: int) -> None:
    answer = answered(page)
    drag(page, answer, "of noise")
    script.mode = status
    again(page).click()
    expect(page.get_by_role("alert")).to_contain_text(f"scripted {status}")
    expect(page.locator(".answer > .text")).to_have_text(ANSWER)
    assert page.get_by_role("button", name="Undo").count() == 0
    script.mode = "ok"
    drag(page, page.locator(".answer"), "of noise")
    again(page).click()
    rewritten(page)


def test_while_an_answer_comes_nothing_can_be_written_again(page: Any, script: Script) -> None:
    answered(page)
    script.gate = Semaphore(STEPS)
    ask(page, "And then?")
    answer, coming = page.locator(".answer").first, page.locator(".answer").last
    expect(coming.locator("> .text")).to_have_text("".join(WORDS[:CANVAS]))
    for one in (coming, answer):
        drag(page, one, "of noise")
        assert page.evaluate("getSelection().toString().trim()") == "of noise"
        expect(page.get_by_role("toolbar")).to_be_hidden()
    script.gate.release(9 * STEPS)
    expect(coming.locator("> .text")).to_have_text(ANSWER)
    again(page).click()  # of what is still selected
    expect(answer.locator("> .text")).to_have_text(NEW)
    expect(coming.locator("> .text")).to_have_text(ANSWER)
    assert script.body["messages"] == script.bodies[0]["messages"]  # not what came after it
    assert page.errors == []


def test_a_reload_keeps_both_answers(page: Any, script: Script) -> None:
    drag(page, answered(page), "of noise")
    again(page).click()
    rewritten(page)
    page.reload()
    expect(page.locator("#model")).to_have_text("scripted")
    drag(page, rewritten(page), "A block")
    expect(page.get_by_role("toolbar")).to_contain_text("2 tokens")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".answer > .text")).to_have_text(ANSWER)


def test_thoughts_stay_and_are_asked_for_again(page: Any, script: Script) -> None:
    page.get_by_label("Think").check()
    drag(page, answered(page), "of noise")
    page.get_by_label("Think").uncheck()
    again(page).click()
    rewritten(page)
    assert script.body["chat_template_kwargs"] == {"enable_thinking": True}


def test_noise_below_one_begins_from_what_is_there(page: Any, script: Script) -> None:
    settle(page, noise_level="0.4", max_tokens="99")
    drag(page, answered(page), "of noise")
    assert "noise_level" not in script.body
    again(page).click()
    rewritten(page)
    assert script.body["noise_level"] == 0.4
    assert script.body["vllm_xargs"] == {"diffusion_seed_canvas": [100 + i for i in range(len(WORDS))]}
    assert script.body["max_tokens"] == END - FIRST


def test_by_touch(browser: Any, script: Script) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(script.url)
    answer = answered(page)
    page.evaluate(  # as a long press does
        "text => getSelection().setBaseAndExtent(text.firstChild, 8, text.firstChild, 16)",
        answer.locator("> .text").element_handle(),
    )
    again(page).tap()
    rewritten(page)
    page.get_by_role("button", name="Undo").tap()
    expect(page.locator(".answer > .text")).to_have_text(ANSWER)
    context.close()


def test_characters_of_several_tokens_and_thoughts_before_the_answer(page: Any) -> None:
    found = page.evaluate("""async () => {
        const { Answer, emptyRecord } = await import("/page/answer.js");
        const texts = ["<|channel>", "hm", "<channel|>", "h", "", "", "\u6f22", "m", "<turn|>"];
        const record = { ...emptyRecord(), content: "h\u6f22m", texts, ids: texts.map((_, i) => i) };
        const answer = new Answer("", record, {}, () => {}, () => {});
        return [[0, 1], [1, 2], [2, 3], [0, 3]].map(([from, to]) => answer.tokensAt(from, to));
    }""")
    assert found == [[3, 4], [4, 7], [7, 8], [3, 8]]


def test_a_narrow_phone_has_room_for_the_toolbar(page: Any, script: Script) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    answer = answered(page)
    page.evaluate("text => getSelection().selectAllChildren(text)", answer.locator("> .text").element_handle())
    expect(page.get_by_role("toolbar")).to_contain_text(f"{len(WORDS)} tokens")
    box = page.get_by_role("toolbar").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 640
