import { Answer, emptyRecord } from "./answer.js";
import * as api from "./api.js";
import { Attachments, contentOf, thumbnails } from "./attach.js";
import { make } from "./dom.js";
import { watchSelection } from "./selection.js";
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

/** turns: [{ ask, shown: files, answer: record, rival: record or null }]; draft: the input; pending: what is being
 * answered. */
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
const attachments = new Attachments($("shown"), () => Boolean(model?.dgemma.images), notice);
const reselect = watchSelection(answers, () => running || !model);

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
  $("attach").hidden = !model.dgemma.images;
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

function messages({ ask, shown }, turns) {
  const system = state.system.trim() ? [{ role: "system", content: state.system }] : [];
  const answered = turns.filter((turn) => turn.answer.content && converses());
  const before = answered.flatMap((turn) => [
    { role: "user", content: contentOf(turn.ask, turn.shown) },
    { role: "assistant", content: turn.answer.content },
  ]);
  return [...system, ...before, { role: "user", content: contentOf(ask, shown) }];
}

function request(asked, turns = state.turns, think = state.think && model.dgemma.thinking) {
  const body = {
    model: model.id,
    messages: messages(asked, turns),
    stream: true,
    draft: true,
    stream_options: { include_usage: true },
    seed: crypto.getRandomValues(new Uint32Array(1))[0], // drawn here: 64 bits do not fit a number
    ...settings.body(),
  };
  if (think) body.chat_template_kwargs = { enable_thinking: true };
  return body;
}

/** Puts a turn on the page: { answer, rival, remove }. */
function show(turn) {
  const rival = turn.rival && new Answer("Answer left to right", turn.rival, settings, follow);
  const files = turn.shown?.length ? [make("div", { className: "files" }, ...thumbnails(turn.shown))] : [];
  const ask = make("article", { className: "ask", ariaLabel: "You" }, ...files, turn.ask);
  const again = make("button", { type: "button", className: "quiet again" }, "Again");
  const element = make("section", { className: "turn" }, ask);
  let answer = null;
  /** An answer in the place of the one before. */
  const put = (record) => {
    const write = (first, end) => rewrite(turn, put, first, end);
    const next = new Answer(rival ? "Answer by diffusion" : "Answer", record, settings, follow, write);
    const undo = make("button", { type: "button", className: "quiet", hidden: !record.former }, "Undo");
    undo.onclick = () => {
      put((turn.answer = record.former)).text.focus();
      save();
    };
    next.tools.append(undo, again);
    answer?.element.replaceWith(next.element);
    answers.delete(answer);
    answers.add(next);
    return (answer = next);
  };
  put(turn.answer);
  if (rival) {
    const column = (title, one) => make("div", {}, make("h2", {}, title), one.element);
    element.append(make("div", { className: "race" }, column("Diffusion", answer), column("Left to right", rival)));
  } else {
    element.append(answer.element);
  }
  const remove = () => {
    for (const one of [answer, rival]) answers.delete(one);
    element.remove();
  };
  again.onclick = () => {
    if (running) return;
    state.turns = state.turns.filter((other) => other !== turn);
    remove();
    start(turn.ask, turn.shown ?? [], Boolean(rival));
  };
  if (rival) answers.add(rival);
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
  start(ask, attachments.take(), race);
}

function setInput(text) {
  $("input").value = state.draft = text;
  save();
}

async function start(ask, shown, race) {
  const turn = { ask, shown, answer: emptyRecord(), rival: race ? emptyRecord(true) : null };
  const body = request(turn);
  delete body.noise_level; // nothing to begin from
  turn.answer.think = Boolean(body.chat_template_kwargs);
  state.pending = ask; // a reload in the middle gives it back
  save();
  const { answer, rival, remove } = show(turn);
  following = true;
  follow();
  const shared = Object.fromEntries(Object.entries(body).filter(([name]) => SHARED.includes(name)));
  const jobs = [[answer, body, race ? 0 : settings.pace]]; // a race waits for nobody's eyes
  if (rival) jobs.push([rival, { ...shared, autoregressive: true }, 0]);
  const outcome = await generate(...jobs);
  state.pending = "";
  const typed = $("input").value;
  if (outcome && !answer.began && !rival?.began) {
    remove();
    attachments.set([...shown, ...attachments.shown]);
    setInput(typed ? `${ask}\n${typed}` : ask);
    if (outcome instanceof api.Gone || outcome.status === 503) unsent = { race };
  } else {
    state.turns.push(turn);
    setInput(typed);
  }
  refocus($("input"));
}

/** Writes tokens of an answer again; all others stay. */
async function rewrite(turn, put, first, end) {
  const former = turn.answer;
  const pins = Object.fromEntries(Object.entries(former.ids).filter(([i]) => i < first || i >= end));
  const before = state.turns.slice(0, state.turns.indexOf(turn));
  const body = { ...request(turn, before, former.think), pins, max_tokens: end - first };
  if (body.noise_level < 1) body.vllm_xargs = { diffusion_seed_canvas: former.ids };
  else delete body.noise_level;
  let answer = put({ ...emptyRecord(), think: former.think, former });
  if (await generate([answer, body, settings.pace]) && !answer.began) answer = put(former);
  turn.answer = answer.record;
  save();
  refocus(answer.text);
}

/** Runs [answer, request, pace] together; what ended the first early, or null. */
async function generate(...jobs) {
  unsent = null;
  notice();
  busy(new AbortController());
  const [outcome] = await Promise.all(jobs.map(attempt));
  busy(null);
  if (outcome && outcome.name !== "AbortError") report(outcome);
  return outcome;
}

async function attempt([answer, body, pace]) {
  try {
    await answer.run(api.chat(body, settings.key, running.signal), pace, body.pins);
    return null;
  } catch (error) {
    answer.setNote(error.name === "AbortError" ? "Stopped." : `Cut off: ${error.message}`);
    return error;
  }
}

function refocus(element) {
  if ([document.body, $("stop")].includes(document.activeElement)) element.focus({ preventScroll: true });
}

function busy(controller) {
  running = controller;
  reselect();
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
$("attach").onclick = () => $("file").click();
$("file").addEventListener("change", () => {
  attachments.add([...$("file").files]);
  $("file").value = "";
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
