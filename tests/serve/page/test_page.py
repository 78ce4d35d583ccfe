"""The page as someone uses it: typed at, clicked, read. The server is scripted (conftest.py)."""

import re
from itertools import pairwise
from threading import Semaphore
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
from playwright.sync_api import expect

from .conftest import ANSWER, CANVAS, STEPS, Script, tokens_of


def ask(page: Any, text: str = "Hello") -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answered(page: Any, text: str = "Hello") -> Any:
    """The newest answer, once it is complete."""
    ask(page, text)
    answer = page.locator(".answer").last
    expect(answer.locator(".status")).to_contain_text("seed")
    return answer


def settle(page: Any, **values: str) -> None:
    """Fills in fields of the settings by their name or id, and closes them."""
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#settings [name={name}], #settings #{name}").fill(value)
    page.get_by_role("button", name="Done").click()


def test_an_answer_streams_and_its_final_text_counts(page: Any, script: Script) -> None:
    answer = answered(page)
    assert answer.locator(".text").last.inner_text() == ANSWER
    words = len(tokens_of(ANSWER))
    status = answer.locator(".status").inner_text()
    for part in (f"{words} tokens", "10 steps", "1.8 tokens/forward", f"{2 * words} tokens/s", "converged"):
        assert part in status
    assert str(script.body["seed"]) in status
    assert script.body["draft"] is True
    assert script.body["stream_options"] == {"include_usage": True}
    assert page.errors == []


def test_the_canvas_shows_entropy_and_fate_while_it_settles(page: Any, script: Script) -> None:
    script.gate = Semaphore(1)
    ask(page)
    cells = page.locator(".answer > .canvas .cell")
    expect(cells).to_have_count(CANVAS)
    expect(page.locator(".status")).to_contain_text("step 2")
    assert re.fullmatch(r"cell e0 (accepted|changed)", cells.nth(0).get_attribute("class"))
    assert cells.nth(1).get_attribute("class") == "cell e0 changed"
    assert cells.nth(1).inner_text() == tokens_of(ANSWER)[1]
    assert re.fullmatch(r"cell e[67] changed", cells.nth(4).get_attribute("class"))  # another noise token each step
    colours = cells.evaluate_all("cells => [0, 4].map(i => getComputedStyle(cells[i]).backgroundColor)")
    assert colours[0] != colours[1]
    script.gate.release(STEPS - 1)
    expect(page.locator(".answer > .text")).to_have_text("".join(tokens_of(ANSWER)[:CANVAS]))
    assert cells.first.evaluate("cell => cell.closest('[aria-live]')") is None


def test_many_cells_at_many_steps_reuse_their_nodes(page: Any, script: Script) -> None:
    script.canvas = 256
    result = page.evaluate("""async () => {
        const { CanvasView } = await import("/page/canvas.js");
        const view = new CanvasView("test");
        document.getElementById("turns").append(view.element);
        const step = s => ({ tokens: Array.from({length: 256}, (_, i) => ` w${s > i % 9 ? i : s}`), canvas: [],
            entropy: Array.from({length: 256}, (_, i) => (i * s) % 5), accepted: Array(256).fill(s % 2) });
        view.draw(step(0), null);
        const first = view.cell(0), begun = performance.now();
        for (let s = 1; s <= 20; s++) { view.draw(step(s), step(s - 1)); view.element.offsetHeight; }
        return { same: first === view.cell(0), count: view.element.childElementCount, ms: performance.now() - begun };
    }""")
    assert result["same"]
    assert result["count"] == 256
    assert result["ms"] < 1000  # twenty steps with their layout, the time they have


def test_steps_replay_back_and_forth(page: Any, script: Script) -> None:
    answer = answered(page)
    answer.get_by_text("Steps", exact=True).click()
    answer.get_by_label("Block", exact=True).select_option("0")
    slider, cells, readout = (
        answer.get_by_label("Step", exact=True),
        answer.locator(".replay .cell"),
        answer.locator("output"),
    )
    words = tokens_of(ANSWER)
    assert readout.inner_text() == f"step {STEPS} of {STEPS}"
    assert cells.all_inner_texts() == words[:CANVAS]
    for _ in range(STEPS - 1):
        slider.press("ArrowLeft")
    assert readout.inner_text() == f"step 1 of {STEPS}"
    assert cells.nth(4).inner_text() == " ?1"
    assert "renoised" in cells.nth(4).get_attribute("class")
    slider.press("ArrowRight")
    assert readout.inner_text() == f"step 2 of {STEPS}"
    assert answer.locator(".charts figcaption").all_inner_texts()[2] == "temperature 0.64"
    assert len(answer.locator("polyline").first.get_attribute("points").split()) == STEPS
    answer.get_by_role("button", name="Play").click()
    expect(readout).to_have_text(f"step {STEPS} of {STEPS}")
    expect(answer.get_by_role("button", name="Play")).to_be_visible()
    answer.get_by_label("Block", exact=True).select_option("1")
    assert cells.all_inner_texts()[: len(words) - CANVAS] == words[CANVAS:]
    assert set(cells.all_inner_texts()[len(words) - CANVAS :]) == {"·"}


def test_a_token_tells_its_history(page: Any, script: Script) -> None:
    answer = answered(page)
    answer.get_by_text("Steps", exact=True).click()
    answer.get_by_label("Block", exact=True).select_option("0")
    answer.locator(".replay .cell").nth(2).hover()
    rows = page.locator("#history tbody tr")
    expect(rows).to_have_count(STEPS)
    assert rows.first.locator("td").all_inner_texts() == [" ?1", "3.380", "re-noised"]
    assert rows.nth(2).locator("td").all_inner_texts() == [" of", "0.001", "changed"]
    assert rows.nth(3).locator("td").all_inner_texts() == [" of", "0.001", "accepted"]
    page.mouse.move(5, 5)
    expect(page.locator("#history")).to_be_hidden()
    answer.get_by_label("Step", exact=True).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#history")).to_contain_text("position 2")
    canvas = answer.locator(".replay .canvas")
    assert answer.locator(f"#{canvas.get_attribute('aria-activedescendant')}").inner_text() == " block"
    page.keyboard.press("Escape")
    expect(page.locator("#history")).to_be_hidden()


def test_stop_keeps_what_is_committed(page: Any, script: Script) -> None:
    script.gate = Semaphore(STEPS)
    ask(page)
    first = "".join(tokens_of(ANSWER)[:CANVAS])
    expect(page.locator(".answer > .text")).to_have_text(first)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    script.gate = None
    answered(page, "And then?")
    assert [m["content"] for m in script.body["messages"]] == ["Hello", first, "And then?"]


def test_what_is_not_committed_is_not_passed_on_and_not_lost(page: Any, script: Script) -> None:
    script.gate = Semaphore(0)
    ask(page, "Stopped at once")
    expect(page.locator(".answer > .canvas .cell").first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    ask(page, "Left for a reload")
    expect(page.locator(".answer > .canvas:visible")).to_have_count(1)
    assert script.body["messages"] == [{"role": "user", "content": "Left for a reload"}]
    page.reload()
    assert page.get_by_label("Message").input_value() == "Left for a reload"
    assert page.locator(".ask").all_inner_texts() == ["Stopped at once"]


def test_the_noise_can_be_shown(page: Any, script: Script) -> None:
    answer = answered(page)
    answer.get_by_text("Steps", exact=True).click()
    answer.get_by_label("Step", exact=True).press("Home")
    token = answer.locator(".replay .cell").nth(4)
    expect(token).to_have_text(" ?1")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Show the noise").check()
    page.get_by_role("button", name="Done").click()
    expect(token).to_have_text(" #1")


def test_a_race_shows_both_texts(page: Any, script: Script) -> None:
    expect(page.locator("#model")).to_have_text("scripted")
    settle(page, max_tokens="64", t_max="0.9")
    script.delay = 0.05
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Race").click()
    expect(page.locator(".race .status")).to_have_count(2)
    expect(page.locator(".race .status").last).to_contain_text("tokens/s")
    expect(page.locator(".race .status").first).to_contain_text("tokens/s")
    assert page.locator(".race .answer > .text").all_inner_texts() == [ANSWER, ANSWER]
    [left, right] = sorted(script.bodies, key=lambda body: "autoregressive" in body)
    assert right["autoregressive"] is True
    assert not {"draft", "t_max"} & right.keys()
    assert (left["t_max"], left["max_tokens"], left["seed"]) == (0.9, 64, right["seed"])
    assert right["max_tokens"] == 64


def test_a_reload_keeps_conversation_draft_and_system_prompt(page: Any, script: Script) -> None:
    page.get_by_text("System prompt").click()
    page.get_by_label("System prompt").fill("Be brief.")
    answered(page)
    page.get_by_label("Message").fill("half a tho")
    page.reload()
    assert page.locator(".ask").all_inner_texts() == ["Hello"]
    assert page.locator(".answer > .text").all_inner_texts() == [ANSWER]
    assert page.get_by_label("Message").input_value() == "half a tho"
    expect(page.locator("#model")).to_have_text("scripted")
    answered(page, "More")
    assert [m["role"] for m in script.body["messages"]] == ["system", "user", "assistant", "user"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.reload()
    assert page.locator(".turn").count() == 0


def test_a_server_that_goes_and_comes_back_loses_no_message(page: Any, script: Script) -> None:
    expect(page.locator("#model")).to_have_text("scripted")
    script.mode = "gone"
    ask(page, "Are you there?")
    expect(page.locator("#banner")).to_contain_text("cannot be reached")
    assert page.get_by_label("Message").input_value() == "Are you there?"
    assert page.locator(".turn").count() == 0
    script.mode = "loading"
    expect(page.locator("#banner")).to_contain_text("loading")
    script.mode = "ok"
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator(".answer > .text")).to_have_text(ANSWER)  # sent again by itself
    assert page.get_by_label("Message").input_value() == ""
    assert page.locator("#notice").is_hidden()


def test_a_stream_that_breaks_off_can_be_asked_again(page: Any, script: Script) -> None:
    script.mode = "drop"
    ask(page)
    expect(page.locator(".note")).to_contain_text("Cut off")
    assert page.locator(".answer > .text").inner_text() == "".join(tokens_of(ANSWER)[:CANVAS])
    script.mode = "ok"
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".answer > .text")).to_have_text(ANSWER)
    assert page.locator(".turn").count() == 1
    assert len(script.body["messages"]) == 1


def test_a_refusal_is_shown_and_gives_the_text_back(page: Any, script: Script) -> None:
    for status, words in ((429, "try again in 7 s"), (500, "scripted 500"), (400, "scripted 400")):
        script.mode = status
        ask(page, f"Please, {status}")
        expect(page.get_by_role("alert")).to_contain_text(words)
        assert page.get_by_label("Message").input_value() == f"Please, {status}"
        assert page.locator(".turn").count() == 0


def test_a_key_is_asked_for_and_used(page: Any, script: Script) -> None:
    script.key = "secret"
    page.reload()
    expect(page.locator("#settings")).to_be_visible()
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("another API key")
    expect(page.locator("#settings")).to_be_visible()
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("scripted")
    answered(page)
    assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0


def test_settings_reach_the_request(page: Any, script: Script) -> None:
    expect(page.locator("#model")).to_have_text("scripted")
    page.get_by_role("button", name="Settings").click()
    assert page.locator("[name=entropy_bound]").get_attribute("placeholder") == "0.1"
    assert page.locator("[name=eos_token_id]").count() == 0
    page.get_by_role("button", name="Done").click()
    settle(page, max_tokens="64", entropy_bound="0.25", seed="42", temperature="0", pace="60")
    page.get_by_label("Think").check()
    answer = answered(page)
    seconds = re.search(r"([\d.]+) s ", answer.locator(".status").inner_text())
    assert seconds
    assert float(seconds[1]) >= 2 * (STEPS - 1) * 0.06  # the pace
    body = script.body
    assert {name: body[name] for name in ("max_tokens", "entropy_bound", "seed", "temperature")} == {
        "max_tokens": 64,
        "entropy_bound": 0.25,
        "seed": 42,
        "temperature": 0,
    }
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert not {"t_min", "t_max", "max_denoising_steps", "api_key"} & body.keys()
    page.reload()
    answered(page, "Again")
    assert script.body["max_tokens"] == 64


def test_think_is_hidden_where_the_model_cannot(page: Any, script: Script) -> None:
    expect(page.get_by_label("Think")).to_be_visible()
    script.thinking = False
    page.reload()
    expect(page.locator("#model")).to_have_text("scripted")
    assert page.get_by_label("Think").is_hidden()


def test_a_model_of_one_task_gets_each_message_alone(page: Any, script: Script) -> None:
    script.conversation = False
    page.reload()
    expect(page.locator("#model")).to_have_text("scripted · each message on its own")
    answered(page, "one")
    answered(page, "two")
    assert script.body["messages"] == [{"role": "user", "content": "two"}]


def test_thoughts_fold_and_calls_are_code(page: Any, script: Script) -> None:
    script.mode = "thoughts"
    answer = answered(page)
    assert answer.locator(".thoughts .text").text_content() == "First, think."
    assert answer.locator(".thoughts").get_attribute("open") is None
    assert answer.locator("> .text").inner_text() == ANSWER
    assert answer.locator("pre code").inner_text() == 'add({"a": 1})'


def test_markup_in_text_stays_text(page: Any, script: Script) -> None:
    evil = "<img src=x onerror=document.title='owned'> <script>document.title='owned'</script> &amp; <b>bold</b>"
    answer = answered(page, f"echo {evil}")
    assert answer.locator("> .text").inner_text() == evil
    assert page.locator(".ask").inner_text() == f"echo {evil}"
    answer.get_by_text("Steps", exact=True).click()
    answer.locator(".replay .cell").first.hover()
    assert page.locator("main img, main b, main script, #history img, #history b").count() == 0
    assert page.title() == "dgemma"
    assert page.errors == []


def test_shift_enter_is_a_new_line_and_copy_copies(page: Any, script: Script) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    box = page.get_by_label("Message")
    box.fill("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    assert script.bodies == []
    box.press("Enter")
    expect(page.locator(".status")).to_contain_text("seed")
    assert script.body["messages"][0]["content"] == "one\ntwo"
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER


def test_every_control_has_a_name(page: Any, script: Script) -> None:
    answer = answered(page)
    answer.get_by_text("Steps", exact=True).click()
    page.get_by_role("button", name="Settings").click()
    nameless = page.evaluate("""() => [...document.querySelectorAll(
        "button, input, select, textarea, [role=listbox], [role=img], main, nav, dialog")].filter(control => {
        const labelled = document.getElementById(control.getAttribute("aria-labelledby"));
        const name = control.ariaLabel || labelled?.textContent || control.labels?.[0]?.textContent
            || (control.tagName === "BUTTON" && control.textContent);
        return !name?.trim();
    }).map(control => control.outerHTML)""")
    assert nameless == []
    for landmark in ("banner", "main", "contentinfo", "navigation"):
        page.keyboard.press("Escape")
        assert page.get_by_role(landmark).count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_every_entropy(page: Any, scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG AA) for the ink on all nine colours, which differ by equal steps of lightness."""
    page.emulate_media(color_scheme=scheme)
    ratios, lightness, faintest = page.evaluate("""() => {
        const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const rgb = (...colours) => {
            for (paint.fillStyle of colours) paint.fillRect(0, 0, 1, 1);
            return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255);
        };
        const linear = v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
        const fills = [...document.querySelectorAll(".ramp i")]
            .map(i => luminance(rgb(getComputedStyle(i).backgroundColor)));
        const ink = luminance(rgb(getComputedStyle(document.body).color));
        const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const worst = document.querySelector("#legend .renoised");
        worst.className = "cell e8 renoised";
        document.getElementById("turns").append(worst);
        const { color, backgroundColor } = getComputedStyle(worst);
        const faintest = contrast(luminance(rgb(backgroundColor, color)), luminance(rgb(backgroundColor)));
        return [fills.map(y => contrast(y, ink)), fills.map(y => Math.cbrt(y)), faintest];
    }""")
    assert len(ratios) == 9
    assert min([*ratios, faintest]) >= 4.5
    strides = [b - a for a, b in pairwise(lightness)]
    assert all(stride * strides[0] > 0 for stride in strides)
    assert max(map(abs, strides)) < 2 * min(map(abs, strides))


def test_the_theme_toggle_wins_over_the_system(page: Any) -> None:
    page.emulate_media(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Colours").click()
    page.get_by_role("button", name="Colours: light").click()
    assert page.evaluate(ground) != light
    page.reload()
    assert page.evaluate(ground) != light


def test_a_narrow_phone_scrolls_only_down(page: Any, script: Script) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    answer = answered(page, f"echo {'x' * 300} and more")
    answer.get_by_text("Steps", exact=True).click()
    answer.locator(".replay .cell").first.dispatch_event("pointerover")
    assert page.locator("#history").is_visible()
    page.get_by_role("button", name="Settings").click()
    widest = (
        "Math.max(...[...document.querySelectorAll('body, #log, #settings')].map(e => e.scrollWidth - e.clientWidth))"
    )
    assert page.evaluate(widest) <= 0
    right = "Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
    assert page.evaluate(right) <= 360


def test_events_are_read_from_pieces_of_any_size(page: Any) -> None:
    crlf = ["da", "ta: a\r", "\n\r\nda", "ta:b\r\n\r\n"]
    streams = [
        ["data: a\n\ndata: b\n\n"],
        crlf,
        list("".join(crlf)),
        ["data: a\r\rdata: b\r\r", ": x\n"],
        [": hi\n\ndata: a\n", "\nid: 1\ndata: b\n\n", "data: not yet com", "plete\n"],
    ]
    read = """async streams => {
        const { SseParser } = await import("/page/sse.js");
        return streams.map(pieces => {
            const parser = new SseParser();
            return pieces.flatMap(piece => parser.push(piece));
        });
    }"""
    assert page.evaluate(read, streams) == [["a", "b"]] * len(streams)
    assert page.evaluate(read, [["data: a\ndata: b\n\n"]]) == [["a\nb"]]
