import { SseParser } from "./sse.js";

/** The server said no. status: HTTP's; message: the server's words; retryAfter: seconds, if it named them. */
export class Refused extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The server cannot be reached, or the connection broke. */
export class Gone extends Error {}

async function request(path, key, options = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Gone("The server cannot be reached.");
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`;
  throw new Refused(response.status, message, response.headers.get("Retry-After"));
}

/** "ok", "loading", "closing" or "gone". */
export async function health() {
  try {
    const response = await fetch("/health", { cache: "no-store" });
    return (await response.json()).status ?? "gone";
  } catch {
    return "gone";
  }
}

/** The one model that is served. */
export async function model(key) {
  return (await (await request("/v1/models", key)).json()).data[0];
}

/** The chunks of one streamed answer. Throws Refused or Gone; aborting the signal throws AbortError. */
export async function* chat(body, key, signal) {
  const response = await request("/v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  const parser = new SseParser();
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Gone("The connection broke.");
      });
      if (done) throw new Gone("The stream ended before the answer did.");
      for (const data of parser.push(decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(500, chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
