// Requests to the server, and its answers as events.

// The data of server-sent events as they arrive.
export async function* serverEvents(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += decoder.decode(value, { stream: true });
      const blocks = held.split(/\r?\n\r?\n/);
      held = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trimStart()).join("\n");
        if (data) yield data;
      }
    }
  } finally { reader.cancel().catch(() => {}); }
}

// What went wrong, and what to do about it: `action` is "retry", "settings", "shorten" or "models".
export class AnswerError extends Error {
  constructor(text, action = "retry") { super(text); this.action = action; }
}

const NOT_OURS = "What answers at this address is not nanochat's server: a proxy or a sign-in page, perhaps. Try again later, or ask who runs it.";
const REASONS = {
  401: ["This server needs an API key. Enter it in the settings, then try again.", "settings"],
  403: ["This server does not accept requests from this page's address.", "retry"],
  404: ["This server does not have that model. Choose another one.", "models"],
  413: ["The conversation is too large for the server. Begin a new one, or shorten the message.", "shorten"],
  429: ["The server is busy. Your message is kept; try again in a moment.", "retry"],
  500: ["The server failed. Its log says why; try again.", "retry"],
  502: ["The server is not running behind its proxy. Your message is kept; try again when it runs.", "retry"],
  503: ["The server is shutting down or not ready yet. Try again in a moment.", "retry"],
  504: ["The answer took too long. Try again, with a shorter limit in the settings.", "retry"],
};
const PLAIN = [401, 429, 502, 503];  // what the server says of these adds nothing

export async function errorOf(response, key = "") {
  const { message: detail, code } = (await response.json().catch(() => null))?.error ?? {}, known = REASONS[response.status];
  if (code === "context_length_exceeded") return new AnswerError(detail, "shorten");
  if (response.status === 401 && key) return new AnswerError("The API key is wrong. Correct it in the settings, then try again.", "settings");
  if (!known && !detail) return new AnswerError(NOT_OURS);
  const wait = Number(response.headers.get("Retry-After"));
  const text = wait > 0 && known ? known[0].replace("in a moment", `in ${wait} s`) : known?.[0] ?? "The server refused this request:";
  return new AnswerError(PLAIN.includes(response.status) || !detail ? text : `${text} ${detail}`, known?.[1]);
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) });

async function request(url, key, body, signal) {
  if (/[^\x00-\xff]/.test(key)) throw new AnswerError("The API key has a character that no key has. Correct it in the settings, then try again.", "settings");
  let response;
  try { response = await fetch(url, { method: body ? "POST" : "GET", headers: headers(key), signal, body: body && JSON.stringify(body) }); }
  catch (error) { throw signal?.aborted ? error : new AnswerError("The server cannot be reached; the page looks for it every few seconds. What is written here is kept."); }
  if (!response.ok) throw await errorOf(response, key);
  return response;
}

export async function getJson(url, key, body, signal) {
  const response = await request(url, key, body, signal);
  return response.json().catch(() => { throw new AnswerError(NOT_OURS); });
}

// Events of an answer: {piece: {kind, text}}, {tokens: [logprob entries]}, {end: reason}, {usage, timings}. Raises AnswerError.
export async function* answerEvents(url, key, body, signal) {
  const response = await request(url, key, body, signal);
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) throw new AnswerError(NOT_OURS);
  try {
    for await (const data of serverEvents(response)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new AnswerError(event.error.message);
      if (event.usage) yield { usage: event.usage, timings: event.timings };
      for (const choice of event.choices || []) yield* choiceEvents(choice);
    }
  } catch (error) {
    if (signal.aborted || error instanceof AnswerError) throw error;
  }
  throw new AnswerError("The connection was lost before the answer was complete. What came is kept.");
}

function* choiceEvents(choice) {
  const delta = choice.delta || {};
  if (choice.logprobs?.content?.length) yield { tokens: choice.logprobs.content };
  if (delta.tool) yield { piece: delta.tool };
  else if (delta.content) yield { piece: { kind: "text", text: delta.content } };
  if (choice.finish_reason) yield { end: choice.finish_reason };
}
