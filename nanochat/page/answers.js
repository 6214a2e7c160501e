// Answers being written, in any number of conversations at once: showing another one does not stop them.

import { announce, notice } from "./dom.js";
import { hold, isWritten, lookElsewhere } from "./presence.js";
import { current, emit, keep, model, on, state } from "./state.js";
import { answerEvents, getJson } from "./stream.js";
import { fromLogprob, tokenId } from "./tokens.js";
import { add, appendPiece, path, textOf, touch } from "./tree.js";

const SAVE_EVERY = 1500;  // ms, while an answer is written
const LOOK_EVERY = 2000;  // ms, while another tab writes one
const BASE_LENGTH = 128;  // tokens that a base model adds at once, if the settings do not say
const CLOSED = "The page was closed before the answer was complete. What came is kept.";
const running = new Map();  // conversation id -> {abort, message}
let leaving = false, timer = null;

export const isRunning = (conversation) => Boolean(conversation && running.has(conversation.id));
export const stop = (conversation) => { if (conversation) running.get(conversation.id)?.abort.abort(); };

export async function setUpAnswers() {
  addEventListener("pagehide", () => { leaving = true; for (const [id] of running) keep(state.chats.get(id)); });
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });  // other tabs went on meanwhile
  on("elsewhere", (conversation) => {
    if (conversation && !state.chats.has(conversation.id)) stop(conversation);
    settle();
  });
  await settle();
}

// Give an end to answers whose tab was closed, and look again while other tabs write.
async function settle() {
  await lookElsewhere();
  let others = false;
  for (const conversation of state.chats.values()) {
    for (const message of Object.values(conversation.messages)) {
      if (message.role === "user" || message.end !== undefined || message.writing) continue;
      if (isWritten(message)) { others = true; continue; }
      Object.assign(message, { end: "error", error: { text: CLOSED, action: "retry" } });
      emit("message", conversation, message);
    }
  }
  clearTimeout(timer);
  if (others) timer = setTimeout(settle, LOOK_EVERY);
}

// ---- requests -----------------------------------------------------------------------------------------------------

const number = (value) => value === "" || value === null || value === undefined ? undefined : Number(value);
const chats = () => model()?.answers ?? true;  // whether the model answers; a base model continues a text

// The messages before an answer as the server takes them. With tool calls as the model wrote them, the prompt begins
// like the last one, so that the server's prefix cache has it.
function toSend(messages) {
  const parts = (m) => m.parts.map(({ kind, text }) => ({ type: kind, text }));
  const sent = messages.map((m) => m.role === "user" ? { role: "user", content: m.text }
    : { role: "assistant", content: parts(m) });
  return state.settings.system ? [{ role: "system", content: state.settings.system }, ...sent] : sent;
}

export const longest = () => number(state.settings.max_tokens) ?? (chats() ? undefined : BASE_LENGTH);

function requestBody(messages, more) {
  const sampling = {};
  for (const name of ["temperature", "top_k", "top_p", "min_p", "seed"]) sampling[name] = number(state.settings[name]);
  return { model: model()?.id, messages, ...sampling, max_tokens: longest(), stream: true, stream_options: { include_usage: true },
    logprobs: true, top_logprobs: 5, logprob_ids: true, ...more };
}

// The end of a text, as much as a base model can read beside what it adds.
async function readable(text, signal) {
  const context = model()?.max_context ?? Infinity;
  const room = context - 1 - Math.min(longest(), Math.floor(context / 2));  // the server clamps what does not fit
  if (new TextEncoder().encode(text).length <= room) return text;  // a token has at least one byte
  const { tokens } = await getJson("tokenize", state.settings.key, { text: text.slice(-200_000) }, signal);
  if (tokens.length <= room) return text;
  const end = await getJson("detokenize", state.settings.key, { tokens: tokens.slice(-Math.max(1, room)) }, signal);
  return end.text.replace(/^\ufffd+/, "");  // a character of which the first bytes were cut
}

// ---- answers ------------------------------------------------------------------------------------------------------

// A new answer after the message `parent`; `tokens`: with which it begins.
export function ask(conversation, parent, tokens = []) {
  if (isRunning(conversation)) return;  // a second click
  const message = add(conversation, parent, { role: "assistant", parts: [], tokens, from: tokens.length, model: model()?.id });
  return write(conversation, message, { prefix: tokens.map(tokenId) });
}

// Another version of an answer that begins with these tokens; one that is being written is stopped first.
export async function branch(conversation, message, tokens) {
  if (message.model !== model()?.id) return void notice(`Another model (${message.model || "unknown"}) wrote this: its tokens are not this model's. Choose that model, or ask again.`);
  stop(conversation);
  while (isRunning(conversation)) await new Promise((resolve) => setTimeout(resolve, 20));
  return ask(conversation, message.parent, tokens);
}

// Go on with an answer that ended too early. It gets longer: by its tokens, if all of them are known to be this model's, so
// that their probabilities stay; else by its text. What a base model adds is a piece of its own.
export function goOn(conversation, message) {
  if (!chats()) return ask(conversation, message.id);
  if (isRunning(conversation)) return;  // a second click
  const known = message.tokens?.length > 0 && message.model === model()?.id;
  if (known) message.from = message.tokens.length; else delete message.tokens;
  delete message.end;
  delete message.error;
  return write(conversation, message, known ? { prefix: message.tokens.map(tokenId) } : { continued: true });
}

async function* events(conversation, message, { prefix = [], continued = false }, signal) {
  const steps = path(conversation), earlier = steps.slice(0, steps.indexOf(message));
  let messages = toSend(continued ? [...earlier, message] : earlier);
  if (!chats()) {
    const text = earlier.map(textOf).join(""), read = await readable(text, signal);
    message.cut = text.length - read.length;
    messages = [{ role: "user", content: read }];
  }
  const more = { ...(prefix.length ? { answer_prefix: prefix } : {}), ...(continued ? { continue_final_message: true, add_generation_prompt: false } : {}) };
  yield* answerEvents("v1/chat/completions", state.settings.key, requestBody(messages, more), signal);
}

async function write(conversation, message, how) {
  const abort = new AbortController(), release = hold(message.id);
  const grown = how.continued ? message : { parts: [] };  // the server repeats the tokens that it is given
  running.set(conversation.id, { abort, message });
  Object.defineProperty(message, "writing", { value: true, writable: true, configurable: true });  // not stored
  touch(message);
  emit("running");
  keep(conversation);
  let saved = performance.now();
  try {
    for await (const event of events(conversation, message, how, abort.signal)) {
      take(event, message, grown);
      touch(message);
      if (performance.now() - saved > SAVE_EVERY) { saved = performance.now(); keep(conversation); }
      emit("message", conversation, message);
    }
    message.end ??= "stop";
  } catch (error) {
    const problem = leaving ? { text: CLOSED, action: "retry" } : { text: error.message || "Something went wrong.", action: error.action || "retry" };
    Object.assign(message, abort.signal.aborted ? { end: "stopped" } : { end: "error", error: problem });
    if (message.error?.action !== "shorten") emit("look");  // is the server still there?
  }
  message.writing = false;
  touch(message);
  touch(conversation);
  running.delete(conversation.id);
  release();
  emit("running");
  emit("message", conversation, message);
  await keep(conversation);
  if (conversation === current()) announce(message.error?.text || "Answer: " + (textOf(message) || "empty"));
}

const length = (parts) => parts.reduce((sum, part) => sum + part.text.length, 0);

// Take an event of the stream into the message. What it had stays until the repeated beginning is as long.
function take(event, message, grown) {
  if (event.piece) {
    appendPiece(grown, event.piece.kind, event.piece.text);
    if (length(grown.parts) >= length(message.parts)) message.parts = grown.parts;
  }
  if (event.tokens) message.tokens?.push(...event.tokens.map(fromLogprob));
  if (event.end) message.end = event.end;
  if (event.usage) {
    message.usage = { tokens: event.usage.completion_tokens, total: event.usage.total_tokens, seconds: event.timings?.answer_seconds };
    message.dropped = event.usage.dropped_messages || 0;
  }
}
