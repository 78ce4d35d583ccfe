import { make } from "./dom.js";

const LEVELS = 8;
const FULL_NATS = 4; // entropy with the deepest colour; the square root keeps the small ones apart
const SPECIAL = /^(<(pad|eos|bos|unk|mask|\|\w+\|?|\w+\|)>)?$/;
const END = /^<(turn\||eos|\|tool_response)>$/;
let count = 0;

export const level = (nats) => Math.round(LEVELS * Math.min(1, Math.sqrt(Math.max(0, nats) / FULL_NATS)));

/** What a step did to a position: "pinned", "changed" (another best token than before), "accepted" or "renoised". */
export function fate(step, before, i) {
  if (step.pinned?.[i]) return "pinned";
  if (before && before.tokens[i] !== step.tokens[i]) return "changed";
  return step.accepted[i] ? "accepted" : "renoised";
}

/** A token as it is drawn: line breaks are seen and break, special tokens are dots. */
export function glyph(text) {
  return SPECIAL.test(text) ? "·" : text.replaceAll("\n", "↵\n");
}

/** One canvas in running text, a cell for each position. Nodes are made once; a step touches only what differs. */
export class CanvasView {
  noise = false; // draw what the next step sees, not the best tokens
  #cells = [];
  #shown = [];

  constructor(label) {
    this.id = `canvas${++count}`;
    this.element = make("div", { className: "canvas", role: "listbox", tabIndex: 0, ariaLabel: label, id: this.id });
  }

  draw(step, before) {
    const texts = this.noise ? step.canvas : step.tokens;
    this.#resize(texts.length);
    let past = false;
    texts.forEach((text, i) => {
      const look = past
        ? "cell past"
        : `cell e${level(step.entropy[i])} ${fate(step, before, i)}${SPECIAL.test(text) ? " special" : ""}`;
      this.#set(i, past ? "·" : glyph(text), look);
      past ||= !this.noise && END.test(text);
    });
  }

  cell(i) {
    return this.#cells[i];
  }

  /** Position of the cell that holds a node, or -1. */
  indexOf(node) {
    return this.#cells.indexOf(node);
  }

  #resize(length) {
    while (this.#cells.length < length) {
      const cell = make("span", { role: "option", id: `${this.id}-${this.#cells.length}` });
      this.#cells.push(cell);
      this.#shown.push({ text: "", look: "" });
      this.element.append(cell);
    }
    while (this.#cells.length > length) {
      this.#cells.pop().remove();
      this.#shown.pop();
    }
  }

  #set(i, text, look) {
    const shown = this.#shown[i];
    if (shown.text !== text) this.#cells[i].textContent = shown.text = text;
    if (shown.look === look) return;
    this.#cells[i].className = shown.look = look;
    this.#cells[i].ariaDescription = look.includes("pinned") ? "kept" : null;
  }
}
