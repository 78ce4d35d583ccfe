import { CanvasView } from "./canvas.js";
import { make } from "./dom.js";
import { hideHistory, Replay, watchHistory } from "./replay.js";
import { watchArrows } from "./selection.js";

const MARKER = /<\|\w+>|<\w+\|>/;
const CALM_SECONDS = 0.5; // between two canvases for who wants less motion
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const BLOCKS = Symbol("steps, in memory only");
const now = () => performance.now() / 1000;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export const emptyRecord = (leftToRight = false) => ({
  content: "",
  ids: [],
  texts: [], // what each token brings
  reasoning: "",
  calls: [],
  note: "",
  usage: null,
  seconds: 0,
  leftToRight,
});

/** One answer on the page: its record (what is kept over a reload), and while it comes the canvas it comes from. */
export class Answer {
  running = false;
  #pins;
  #step = null;
  #frame = 0;
  #begun = 0;
  #stepAt = 0;
  #drawnAt = -Infinity;
  #replay = null;
  #final = false; // the whole text has come: what deltas still bring is in it

  /** settings: the page's; drawn(): called after every change of what is seen; rewrite(first, end): of tokens. */
  constructor(title, record, settings, drawn = () => {}, rewrite = null) {
    this.record = record;
    this.rewrite = rewrite;
    this.settings = settings;
    this.drawn = drawn;
    this.view = new CanvasView("Canvas of the current block");
    watchHistory(this.view, () => ({ steps: this.#steps, at: this.#steps.length - 1 }));
    this.thought = make("div", { className: "text faint" });
    this.thoughts = make("details", { className: "thoughts", hidden: true }, make("summary", {}, "Thoughts"));
    this.thoughts.append(this.thought);
    this.text = make("div", { className: "text", role: "group", ariaLabel: "Text: arrows select", ariaLive: "polite" });
    watchArrows(this.text);
    this.calls = make("div");
    this.note = make("p", { className: "note", hidden: true });
    this.status = make("span", { className: "status faint" });
    this.copy = make("button", { type: "button", className: "quiet", onclick: () => this.#copy() }, "Copy");
    this.tools = make("div", { className: "tools" }, this.status, this.copy);
    this.steps = make("details", { className: "steps", hidden: true }, make("summary", {}, "Steps"));
    this.steps.addEventListener("toggle", () => this.#unfold());
    this.element = make("article", { className: "answer", ariaLabel: title });
    this.element.append(this.thoughts, this.text, this.view.element, this.calls, this.note, this.tools, this.steps);
    this.#draw();
  }

  /** Takes a stream to its end. What throws on the way is thrown on; the answer keeps what it had. */
  async run(chunks, pace, pins = {}) {
    this.running = true;
    this.#pins = pins;
    this.#begun = now();
    const clock = setInterval(() => this.#schedule(), 100);
    try {
      this.#draw();
      for await (const chunk of chunks) {
        this.#take(chunk);
        if (chunk.dgemma?.event === "step") await this.#hold(pace);
      }
    } finally {
      clearInterval(clock);
      this.running = false;
      this.record.seconds = now() - this.#begun;
      this.#step = null;
      this.#draw();
    }
  }

  setNote(note) {
    this.record.note = note;
    this.#draw();
  }

  /** The settings have changed. */
  refresh() {
    if (this.#replay) this.#replay.noise = this.settings.noise;
    this.#draw();
  }

  get began() {
    const { content, reasoning, calls } = this.record;
    return Boolean(content || reasoning || calls.length || this.#blocks.length);
  }

  /** First, and behind the last, of the tokens that characters of the text come from, or null. */
  tokensAt(from, to) {
    const { texts, content } = this.record;
    const begin = texts.join("").lastIndexOf(content); // thoughts come before
    if (begin < 0) return null;
    let past = -begin;
    const touched = texts.map((text) => {
      const at = past;
      past += text.length;
      return at < to && (past > from || (!text && at >= from)); // without text: a part of a character
    });
    return touched.includes(true) ? [touched.indexOf(true), touched.lastIndexOf(true) + 1] : null;
  }

  get #blocks() {
    return (this.record[BLOCKS] ??= []);
  }

  get #steps() {
    return this.#blocks.at(-1) ?? [];
  }

  #take(chunk) {
    const { record } = this;
    const delta = chunk.choices?.[0]?.delta ?? {};
    if (!this.#final) record.content += delta.content ?? "";
    record.reasoning += delta.reasoning_content ?? "";
    for (const call of delta.tool_calls ?? []) {
      const known = (record.calls[call.index ?? 0] ??= { name: "", arguments: "" });
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    record.usage = chunk.usage ?? record.usage;
    const event = chunk.dgemma ?? {};
    if (event.event === "step") {
      event.pinned = event.tokens.map((_, i) => record.ids.length + i in this.#pins);
      (this.#blocks[event.block] ??= []).push(event);
      this.#step = event;
    } else if (event.event === "block") {
      this.#step = null;
      record.ids.push(...event.ids);
      record.texts.push(...event.texts);
    } else if (event.event === "finished") {
      record.usage = event.usage ?? record.usage;
      // With markers in it, the text is still to be taken apart, which the deltas already are.
      this.#final = !MARKER.test(event.text);
      if (this.#final) record.content = event.text;
    }
    this.#schedule();
  }

  /** A step stays on the page for `pace` milliseconds at least: small models are done before anyone has looked. */
  async #hold(pace) {
    const rest = pace - (performance.now() - this.#stepAt);
    if (pace && rest > 0) await sleep(rest);
    this.#stepAt = performance.now();
  }

  #schedule() {
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { record } = this;
    this.#drawText(this.thought, record.reasoning);
    this.#drawText(this.text, record.content);
    this.#drawThoughts();
    if (record.calls.length) {
      const written = record.calls.map((call) => `${call.name}(${call.arguments})`);
      this.calls.replaceChildren(...written.map((call) => make("pre", {}, make("code", {}, call))));
    }
    if (this.#step) {
      this.#drawCanvas();
    } else if (!this.view.element.hidden) hideHistory();
    this.view.element.hidden = !this.#step;
    this.note.textContent = record.note;
    this.note.hidden = !record.note;
    this.status.textContent = this.running ? this.#progress() : summary(record);
    this.copy.hidden = this.running || !record.content;
    this.steps.hidden = this.running || !this.#blocks.some((steps) => steps?.length);
    this.element.classList.toggle("running", this.running);
    this.editable = Boolean(this.rewrite && !this.running && record.content && record.ids?.length);
    this.text.tabIndex = this.editable ? 0 : -1;
    this.drawn();
  }

  #drawCanvas() {
    if (calm.matches && now() - this.#drawnAt < CALM_SECONDS) return;
    this.#drawnAt = now();
    this.view.noise = this.settings.noise;
    this.view.draw(this.#step, this.#steps.at(-2));
  }

  /** Only what is new is added, so that a screen reader reads nothing twice. */
  #drawText(element, text) {
    const shown = element.textContent;
    if (text === shown) return;
    if (text.startsWith(shown)) element.append(text.slice(shown.length));
    else element.textContent = text;
  }

  /** Thoughts are open while there is nothing else. */
  #drawThoughts() {
    if (!this.record.reasoning) return;
    if (this.thoughts.hidden) this.thoughts.open = this.running;
    if (this.record.content && !this.thoughts.dataset.folded) {
      this.thoughts.open = false;
      this.thoughts.dataset.folded = "once";
    }
    this.thoughts.hidden = false;
  }

  #progress() {
    const step = this.#step;
    const clock = `${(now() - this.#begun).toFixed(1)} s`;
    if (!step) return clock;
    const [heat, doubt] = [step.temperature.toFixed(2), step.mean_entropy.toFixed(3)];
    return `block ${step.block + 1} · step ${step.step} · T ${heat} · H ${doubt} · ${clock}`;
  }

  #unfold() {
    if (!this.steps.open) return this.#replay?.pause();
    if (!this.#replay) {
      this.#replay = new Replay(this.#blocks.filter((steps) => steps?.length), this.settings.noise);
      this.steps.append(this.#replay.element);
    }
    this.steps.scrollIntoView({ block: "nearest" });
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.record.content);
      this.copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.text); // no clipboard without https: the text is at least selected
      this.copy.textContent = "Selected";
    }
    setTimeout(() => (this.copy.textContent = "Copy"), 1500);
  }
}

/** What came of an answer, in one line. */
function summary({ usage, seconds, leftToRight }) {
  if (!usage) return seconds ? `${seconds.toFixed(1)} s` : "";
  const run = usage.diffusion ?? {};
  const busy = (run.prefill_seconds ?? 0) + (run.denoise_seconds ?? 0) + (run.commit_seconds ?? 0) || seconds;
  const parts = [`${usage.completion_tokens} tokens`, `${seconds.toFixed(1)} s`];
  if (run.denoising_steps) parts.push(`${run.denoising_steps} steps`);
  if (run.tokens_per_forward) parts.push(`${run.tokens_per_forward.toFixed(1)} tokens/forward`);
  parts.push(`${(usage.completion_tokens / Math.max(1e-6, busy)).toFixed(0)} tokens/s`);
  if ("converged" in run && !leftToRight) parts.push(run.converged ? "converged" : "not converged");
  if ("seed" in run) parts.push(`seed ${run.seed}`);
  return parts.join(" · ");
}
