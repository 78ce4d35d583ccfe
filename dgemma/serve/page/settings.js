import { make } from "./dom.js";

/** Form fields of a request: name in it, the default's name in GET /v1/models, words, attributes of the input. */
const FIELDS = [
  ["max_tokens", "max_new_tokens", "Tokens at most", { min: 1, step: 1 }],
  ["max_denoising_steps", "max_denoising_steps", "Steps a block gets at most", { min: 1, step: 1 }],
  ["entropy_bound", "entropy_bound", "Nats a step may accept beyond one token", { min: 0, step: "any" }],
  ["t_min", "t_min", "Temperature towards the last step", { min: 0, step: "any" }],
  ["t_max", "t_max", "Temperature of the first step", { min: 0, step: "any" }],
  ["stability_threshold", "stability_threshold", "Earlier steps with the same canvas to stop", { min: 0, step: 1 }],
  ["confidence_threshold", "confidence_threshold", "Mean entropy in nats to stop", { min: 0, step: "any" }],
  ["temperature", null, "Factor on both temperatures (0: greedy)", { min: 0, max: 2, step: "any", placeholder: "1" }],
  ["noise_level", null, "Noise in what is written again", { min: 0.05, max: 1, step: "any", placeholder: "1" }],
  ["seed", null, "Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, placeholder: "random" }],
];
const STORE = "dgemma.settings";
const $ = (id) => document.getElementById(id);

/** The settings dialog. changed(): called when it closes. */
export class Settings {
  #inputs = new Map();

  constructor(changed) {
    this.dialog = $("settings");
    this.dialog.addEventListener("close", () => {
      this.#save();
      changed();
    });
    $("open-settings").onclick = () => this.open();
    $("defaults").onclick = () => {
      for (const input of this.#inputs.values()) input.value = "";
    };
    this.saved = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
    $("key").value = this.saved.key ?? "";
    $("noise").checked = this.saved.noise ?? false;
    $("pace").value = this.saved.pace ?? $("pace").value;
  }

  open(focus = null) {
    if (!this.dialog.open) this.dialog.showModal();
    if (focus) $(focus).focus();
  }

  /** Makes the fields, once the model's defaults are known. */
  build(defaults) {
    const present = FIELDS.filter(([, source]) => source === null || source in defaults);
    this.#inputs = new Map(
      present.map(([name, source, , attributes]) => {
        const value = this.saved.body?.[name] ?? "";
        const placeholder = source ? String(defaults[source]) : attributes.placeholder;
        return [name, make("input", { type: "number", name, ...attributes, placeholder, value })];
      }),
    );
    const labels = present.map(([name, , words]) => make("label", {}, make("span", {}, words), this.#inputs.get(name)));
    $("decoding").replaceChildren($("decoding").firstElementChild, ...labels);
  }

  get key() {
    return $("key").value;
  }

  get noise() {
    return $("noise").checked;
  }

  /** Milliseconds that a step is shown at least. */
  get pace() {
    return $("pace").valueAsNumber || 0;
  }

  /** The fields that someone has filled in, for the request. */
  body() {
    const filled = [...this.#inputs].filter(([, input]) => input.value !== "" && input.validity.valid);
    return Object.fromEntries(filled.map(([name, input]) => [name, input.valueAsNumber]));
  }

  #save() {
    this.saved = { body: this.body(), key: this.key, noise: this.noise, pace: this.pace };
    sessionStorage.setItem(STORE, JSON.stringify(this.saved));
  }
}
