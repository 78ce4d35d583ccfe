import { Answer, emptyRecord } from "./answer.js";
import * as api from "./api.js";
import { make } from "./dom.js";
import { Settings } from "./settings.js";

const STORE = "dgemma.chat";
const HEALTHY_MS = 10_000;
const RETRY_MS = 1_000;
const WORDS = {
  gone: "The server cannot be reached. Trying again every second; nothing you wrote is lost.",
  loading: "The server is loading the model.",
  closing: "The server is closing.",
};
/** Fields that mean the same left to right; the server refuses those of denoising there. */
const SHARED = ["model", "messages", "stream", "stream_options", "seed", "max_tokens", "chat_template_kwargs"];
const SCHEMES = { "light dark": "as the system", light: "light", dark: "dark" };
const $ = (id) => document.getElementById(id);

/** turns: [{ ask, answer: record, rival: record or null }]; draft: the input; pending: what is being answered. */
const state = { turns: [], system: "", draft: "", pending: "", think: false };
Object.assign(state, JSON.parse(sessionStorage.getItem(STORE) ?? "{}"));
let model = null;
let server = "unknown";
let timer = 0;
let running = null; // AbortController of the answer that comes
let unsent = null; // { race } of a message that the server was not there for
let following = true; // the log is scrolled to its end, and stays there
const answers = new Set();
const settings = new Settings(settingsClosed);

function save() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // Full: the conversation goes on, but ends with this tab.
  }
}

function follow() {
  if (following) $("log").scrollTop = $("log").scrollHeight;
}

function notice(text = "") {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// The server

async function check() {
  const before = server;
  server = await api.health();
  $("banner").textContent = WORDS[server] ?? "";
  $("banner").hidden = server === "ok";
  clearTimeout(timer);
  timer = setTimeout(check, server === "ok" ? HEALTHY_MS : RETRY_MS);
  if (server !== "ok" || before === "ok") return;
  await loadModel(); // it may be another one now
}

async function loadModel() {
  try {
    model = await api.model(settings.key);
  } catch (error) {
    return report(error);
  }
  notice();
  $("model").textContent = converses() ? model.id : `${model.id} · each message on its own`;
  $("think-box").hidden = !model.dgemma.thinking;
  settings.build(model.dgemma.defaults);
  if (unsent) send(unsent.race);
}

/** Whether earlier turns go along: a model made for one task reads only its prompt. */
function converses() {
  return model.dgemma.conversation ?? true;
}

function settingsClosed() {
  if (!model) loadModel();
  for (const answer of answers) answer.refresh();
}

function report(error) {
  if (error instanceof api.Gone || error.status === 503) check();
  if (error.status === 401) {
    notice("The server wants another API key.");
    settings.open("key");
  } else if (error.status === 429) {
    notice(`The server is busy${error.retryAfter ? `: try again in ${error.retryAfter} s` : ""}. ${error.message}`);
  } else {
    notice(error.message);
  }
}

// The conversation

function messages(ask) {
  const system = state.system.trim() ? [{ role: "system", content: state.system }] : [];
  const answered = state.turns.filter((turn) => turn.answer.content && converses());
  const before = answered.flatMap((turn) => [
    { role: "user", content: turn.ask },
    { role: "assistant", content: turn.answer.content },
  ]);
  return [...system, ...before, { role: "user", content: ask }];
}

function request(ask) {
  const body = {
    model: model.id,
    messages: messages(ask),
    stream: true,
    stream_options: { include_usage: true },
    seed: crypto.getRandomValues(new Uint32Array(1))[0], // drawn here: 64 bits do not fit a number
    ...settings.body(),
  };
  if (state.think && model.dgemma.thinking) body.chat_template_kwargs = { enable_thinking: true };
  return body;
}

/** Puts a turn on the page: { answer, rival, remove }. */
function show(turn) {
  const answer = new Answer(turn.rival ? "Answer by diffusion" : "Answer", turn.answer, settings, follow);
  const rival = turn.rival && new Answer("Answer left to right", turn.rival, settings, follow);
  const ask = make("article", { className: "ask", ariaLabel: "You" }, turn.ask);
  const again = make("button", { type: "button", className: "quiet again" }, "Again");
  const element = make("section", { className: "turn" }, ask);
  answer.tools.append(again);
  if (rival) {
    const column = (title, one) => make("div", {}, make("h2", {}, title), one.element);
    element.append(make("div", { className: "race" }, column("Diffusion", answer), column("Left to right", rival)));
  } else {
    element.append(answer.element);
  }
  const both = [answer, rival].filter(Boolean);
  const remove = () => {
    for (const one of both) answers.delete(one);
    element.remove();
  };
  again.onclick = () => {
    if (running) return;
    state.turns = state.turns.filter((other) => other !== turn);
    remove();
    start(turn.ask, Boolean(rival));
  };
  for (const one of both) answers.add(one);
  $("turns").append(element);
  $("empty").hidden = true;
  return { answer, rival, remove };
}

function send(race) {
  const ask = $("input").value;
  if (running || !ask.trim()) return;
  if (!model) {
    unsent = { race };
    return void loadModel();
  }
  setInput("");
  start(ask, race);
}

function setInput(text) {
  $("input").value = state.draft = text;
  save();
}

async function start(ask, race) {
  const turn = { ask, answer: emptyRecord(), rival: race ? emptyRecord(true) : null };
  const body = request(ask);
  state.pending = ask; // a reload in the middle gives it back
  save();
  const { answer, rival, remove } = show(turn);
  following = true;
  follow();
  unsent = null;
  notice();
  busy(new AbortController());
  const { signal } = running;
  const shared = Object.fromEntries(Object.entries(body).filter(([name]) => SHARED.includes(name)));
  const stream = (body) => api.chat(body, settings.key, signal);
  const [outcome] = await Promise.all([
    attempt(answer, stream({ ...body, draft: true }), race ? 0 : settings.pace), // a race waits for nobody's eyes
    rival && attempt(rival, stream({ ...shared, autoregressive: true }), 0),
  ]);
  busy(null);
  state.pending = "";
  const typed = $("input").value;
  if (outcome && !answer.began && !rival?.began) {
    remove();
    setInput(typed ? `${ask}\n${typed}` : ask);
    if (outcome instanceof api.Gone || outcome.status === 503) unsent = { race };
  } else {
    state.turns.push(turn);
    setInput(typed);
  }
  if (outcome && outcome.name !== "AbortError") report(outcome);
  if ([document.body, $("stop")].includes(document.activeElement)) $("input").focus();
}

/** Runs one answer; what ended it early, or null. */
async function attempt(answer, chunks, pace) {
  try {
    await answer.run(chunks, pace);
    return null;
  } catch (error) {
    answer.setNote(error.name === "AbortError" ? "Stopped." : `Cut off: ${error.message}`);
    return error;
  }
}

function busy(controller) {
  running = controller;
  $("stop").hidden = !controller;
  $("send").hidden = $("race").hidden = $("new").disabled = Boolean(controller);
}

function clear() {
  state.turns = [];
  answers.clear();
  $("turns").replaceChildren();
  $("empty").hidden = false;
  notice();
  save();
  $("input").focus();
}

// The controls

function paint(scheme) {
  document.documentElement.style.colorScheme = scheme;
  $("theme").ariaLabel = $("theme").title = `Colours: ${SCHEMES[scheme]}`;
  localStorage.setItem("dgemma.scheme", scheme);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(false);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(false);
});
$("input").addEventListener("input", () => {
  unsent = null;
  state.draft = $("input").value;
  save();
});
$("system").addEventListener("input", () => {
  state.system = $("system").value;
  save();
});
$("think").addEventListener("change", () => {
  state.think = $("think").checked;
  save();
});
$("race").onclick = () => send(true);
$("stop").onclick = () => running?.abort();
$("new").onclick = clear;
$("theme").onclick = () => {
  const schemes = Object.keys(SCHEMES);
  paint(schemes[(schemes.indexOf(document.documentElement.style.colorScheme) + 1) % schemes.length]);
};
$("log").addEventListener("scroll", () => {
  const log = $("log");
  following = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
}, { passive: true });

paint(localStorage.getItem("dgemma.scheme") ?? "light dark");
setInput([state.pending, state.draft].filter(Boolean).join("\n"));
state.pending = "";
$("system").value = state.system;
$("system-box").open = Boolean(state.system);
$("think").checked = state.think;
for (const turn of state.turns) show(turn);
follow();
check();
