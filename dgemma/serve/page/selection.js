import { make } from "./dom.js";

const button = make("button", { type: "button", className: "main" });
const bar = make("div", { id: "selection", role: "toolbar", ariaLabel: "Selected text", ariaLive: "polite" }, button);
let chosen; // { answer, tokens: [first, end] }

/** From where to where in an element's text the page's selection is, or null. */
function selectedIn(element) {
  const selection = getSelection();
  const range = selection.isCollapsed ? null : selection.getRangeAt(0).cloneRange();
  if (!range || !element.contains(range.startContainer)) return null;
  const before = document.createRange();
  before.selectNodeContents(element);
  if (!element.contains(range.endContainer)) range.setEnd(element, before.endOffset);
  before.setEnd(range.startContainer, range.startOffset);
  const from = String(before).length;
  return [from, from + String(range).length];
}

/** Arrow keys select in a focused text: the next word, or with Shift a character more (with Ctrl a word). */
export function watchArrows(element) {
  element.addEventListener("keydown", (event) => {
    const to = { ArrowRight: "forward", ArrowLeft: "backward" }[event.key];
    if (!to || element.tabIndex < 0) return;
    event.preventDefault();
    const selection = getSelection();
    if (!selectedIn(element)) selection.collapse(element, 0);
    else if (!event.shiftKey) selection[to === "forward" ? "collapseToEnd" : "collapseToStart"]();
    selection.modify("extend", to, event.shiftKey && !event.ctrlKey ? "character" : "word");
  });
}

/** A toolbar comes up beside what is selected in an answer, while all are complete. Returns what looks anew. */
export function watchSelection(answers, busy) {
  const find = () => {
    for (const answer of busy() ? [] : answers) {
      const places = answer.editable && selectedIn(answer.text);
      const tokens = places && answer.tokensAt(...places);
      if (tokens) return { answer, tokens };
    }
  };
  const update = () => {
    chosen = find();
    bar.hidden = !chosen;
    if (!chosen) return;
    const { answer: { text }, tokens: [first, end] } = chosen;
    button.textContent = `Write again (${end - first} token${end - first > 1 ? "s" : ""})`;
    if (bar.previousSibling !== text) text.after(bar); // the next stop of Tab
    const { left, bottom } = getSelection().getRangeAt(0).getBoundingClientRect();
    bar.style.left = `min(${left}px, 100vw - 14rem)`;
    bar.style.top = `clamp(4px, ${bottom + 6}px, 100vh - 4rem)`;
  };
  button.onclick = () => {
    const { answer, tokens } = find() ?? chosen; // a touch may have ended it
    getSelection().empty();
    answer.rewrite(...tokens);
  };
  bar.onmousedown = (event) => event.preventDefault(); // it would end the selection
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !chosen) return;
    if (bar.contains(document.activeElement)) chosen.answer.text.focus();
    getSelection().empty();
  });
  addEventListener("scroll", update, { capture: true, passive: true });
  document.addEventListener("selectionchange", update);
  return update;
}
