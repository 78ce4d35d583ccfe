import { CanvasView, fate, glyph, level } from "./canvas.js";
import { make, svg } from "./dom.js";

const PLAY_MS = 150;
const WORDS = { pinned: "kept", renoised: "re-noised" };
const popover = make("div", { id: "history", role: "tooltip", hidden: true });
document.body.append(popover);
let hiding = 0;
const keep = () => clearTimeout(hiding);
const hideSoon = (event) => {
  // Time for the pointer to reach the popover. A finger leaves as it lifts: there the next touch hides it.
  if (event.pointerType !== "touch") hiding = setTimeout(hideHistory, 200);
};
popover.addEventListener("pointerenter", keep);
popover.addEventListener("pointerleave", hideSoon);
addEventListener("pointerdown", (event) => popover.contains(event.target) || hideHistory(), { capture: true });

export function hideHistory() {
  popover.hidden = true;
}

function showHistory(cell, i, steps, at) {
  keep();
  const rows = steps.map((step, s) => {
    const did = fate(step, steps[s - 1], i);
    const token = glyph(step.tokens[i]).trimEnd() || "␣";
    return make(
      "tr",
      s === at ? { ariaCurrent: "step" } : {},
      make("th", { scope: "row" }, String(step.step)),
      make("td", {}, make("span", { className: `cell e${level(step.entropy[i])} ${did}` }, token)),
      make("td", { className: "number" }, step.entropy[i].toFixed(3)),
      make("td", {}, WORDS[did] ?? did),
    );
  });
  const head = make("tr", {}, ...["step", "token", "nats", ""].map((name) => make("th", { scope: "col" }, name)));
  popover.replaceChildren(
    make("p", {}, `position ${i + 1}`),
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
  );
  popover.hidden = false;
  const near = cell.getClientRects()[0];
  const own = popover.getBoundingClientRect();
  const below = near.bottom + own.height + 8 < innerHeight;
  popover.style.left = `${Math.max(4, Math.min(near.left, innerWidth - own.width - 4))}px`;
  popover.style.top = `${Math.max(4, below ? near.bottom + 4 : near.top - own.height - 4)}px`;
  popover.scrollTop = (rows[at]?.offsetTop ?? 0) - own.height / 2;
}

/** Hover or focus on a cell shows its history. source(): the steps of its block and the index of the one drawn. */
export function watchHistory(view, source) {
  const { element } = view;
  let active = 0;
  const show = (i) => {
    const { steps, at } = source();
    if (view.cell(i) && steps.length) showHistory(view.cell(i), i, steps, at);
  };
  const activate = (i) => {
    const cell = view.cell(i);
    if (!cell) return;
    view.cell(active)?.removeAttribute("aria-selected");
    active = i;
    cell.setAttribute("aria-selected", "true");
    element.setAttribute("aria-activedescendant", cell.id);
    cell.scrollIntoView({ block: "nearest" });
    show(i);
  };
  element.addEventListener("pointerover", (event) => {
    const i = view.indexOf(event.target);
    if (i >= 0) show(i);
  });
  element.addEventListener("pointerleave", hideSoon);
  element.addEventListener("focus", () => element.matches(":focus-visible") && activate(active));
  element.addEventListener("blur", () => {
    view.cell(active)?.removeAttribute("aria-selected");
    hideHistory();
  });
  element.addEventListener("keydown", (event) => {
    const last = element.children.length - 1;
    const to = { ArrowRight: active + 1, ArrowLeft: active - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hideHistory();
    if (to === undefined) return;
    event.preventDefault();
    activate(Math.max(0, Math.min(last, to)));
  });
}

/** A line over the steps of a block, with a cursor. */
function chart(name, values, digits) {
  const top = Math.max(...values, 1e-9);
  const x = (i) => (values.length > 1 ? (100 * i) / (values.length - 1) : 50);
  const y = (value) => 29 - (28 * value) / top;
  const cursor = svg("line", { y1: 0, y2: 30, class: "cursor" });
  const [first, last] = [values[0], values.at(-1)].map((value) => value.toFixed(digits));
  const label = `${name} by step, ${first} to ${last}`;
  const picture = svg(
    "svg",
    { viewBox: "0 0 100 30", preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("polyline", { points: values.map((value, i) => `${x(i)},${y(value)}`).join(" ") }),
    cursor,
  );
  const caption = make("figcaption");
  const mark = (i) => {
    cursor.setAttribute("x1", x(i));
    cursor.setAttribute("x2", x(i));
    caption.textContent = `${name} ${values[i].toFixed(digits)}`;
  };
  return { element: make("figure", {}, caption, picture), mark };
}

/** All steps of a finished answer, forwards and back. blocks: [[step, …], …], none of them empty. */
export class Replay {
  #blocks;
  #steps = [];
  #charts = [];
  #timer = 0;

  constructor(blocks, noise) {
    this.#blocks = blocks;
    this.view = new CanvasView("Canvas at this step");
    this.view.noise = noise;
    watchHistory(this.view, () => ({ steps: this.#steps, at: this.at }));
    this.block = make("select", { ariaLabel: "Block", onchange: () => this.#open(Number(this.block.value)) });
    this.block.append(...blocks.map((_, b) => make("option", { value: b }, `Block ${b + 1} of ${blocks.length}`)));
    this.block.hidden = blocks.length === 1;
    this.range = make("input", { type: "range", min: 0, ariaLabel: "Step", oninput: () => this.#seek() });
    this.player = make("button", { type: "button", className: "play", onclick: () => this.#toggle() }, "Play");
    this.readout = make("output", { className: "faint" });
    this.figures = make("div", { className: "charts" });
    const controls = make("div", { className: "controls" }, this.player, this.block, this.range, this.readout);
    this.element = make("div", { className: "replay" }, controls, this.view.element, this.figures);
    this.#open(blocks.length - 1);
  }

  get at() {
    return Number(this.range.value);
  }

  set noise(on) {
    this.view.noise = on;
    this.#draw();
  }

  pause() {
    clearInterval(this.#timer);
    this.#timer = 0;
    this.player.textContent = "Play";
  }

  #open(block) {
    this.pause();
    this.block.value = block;
    this.#steps = this.#blocks[block];
    const taken = this.#steps.map((step) => step.accepted.reduce((sum, one) => sum + one, 0));
    this.#charts = [
      chart("mean entropy", this.#steps.map((step) => step.mean_entropy), 3),
      chart("accepted", taken, 0),
      chart("temperature", this.#steps.map((step) => step.temperature), 2),
    ];
    this.figures.replaceChildren(...this.#charts.map((one) => one.element));
    this.range.max = this.#steps.length - 1;
    this.range.value = this.range.max;
    this.#draw();
  }

  #seek() {
    this.pause();
    this.#draw();
  }

  #toggle() {
    if (this.#timer) return this.pause();
    if (this.at === this.#steps.length - 1) this.range.value = 0;
    this.player.textContent = "Pause";
    this.#draw();
    this.#timer = setInterval(() => {
      if (this.at >= this.#steps.length - 1 || !this.element.isConnected) return this.pause();
      this.range.value = this.at + 1;
      this.#draw();
    }, PLAY_MS);
  }

  #draw() {
    const step = this.#steps[this.at];
    this.view.draw(step, this.#steps[this.at - 1]);
    this.readout.textContent = `step ${step.step} of ${this.#steps.at(-1).step}`;
    this.range.setAttribute("aria-valuetext", this.readout.textContent);
    for (const one of this.#charts) one.mark(this.at);
  }
}
