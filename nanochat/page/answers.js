// Answers being written, in any number of conversations at once: showing another one does not stop them.

import { announce } from "./dom.js";
import { current, emit, keep, model, state } from "./state.js";
import { answerEvents } from "./stream.js";
import { fromLogprob, tokenId } from "./tokens.js";
import { add, appendPiece, path, textOf } from "./tree.js";

const SAVE_EVERY = 1500;  // ms, while an answer is written
const SILENT = 10_000;  // ms: another tab that has not saved for longer than this has been closed
const running = new Map();  // conversation id -> {abort, message}
let leaving = false;
addEventListener("pagehide", () => { leaving = true; for (const [id] of running) keep(state.chats.get(id)); });
addEventListener("pageshow", () => { leaving = false; });

export const isRunning = (conversation) => Boolean(conversation && running.has(conversation.id));
export const stop = (conversation) => { if (conversation) running.get(conversation.id)?.abort.abort(); };

// Whether an answer without an end is still being written, here or in another tab.
export const isWritten = (message) => message.end === undefined && (message.writing || Date.now() - message.changed < SILENT);

const number = (value) => value === "" || value === null || value === undefined ? undefined : Number(value);

// The messages before an answer as the server takes them. With tool calls as the model wrote them, the prompt begins
// like the last one, so that the server's prefix cache has it.
function toSend(earlier) {
  const parts = (m) => m.parts.map(({ kind, text }) => ({ type: kind, text }));
  const sent = earlier.map((m) => m.role === "user" ? { role: "user", content: m.text }
    : { role: "assistant", content: m.parts.some((p) => p.kind !== "text") ? parts(m) : textOf(m) });
  if (!model()?.answers) return [{ role: "user", content: earlier.map(textOf).join("") }];  // a base model continues a text
  return state.settings.system ? [{ role: "system", content: state.settings.system }, ...sent] : sent;
}

// The body of a request; `prefix`: ids of tokens with which the answer begins.
export function requestBody(earlier, prefix = []) {
  const s = state.settings, sampling = {};
  for (const name of ["temperature", "top_k", "top_p", "min_p", "max_tokens", "seed"]) sampling[name] = number(s[name]);
  return { model: model()?.id, messages: toSend(earlier), ...sampling, stream: true, stream_options: { include_usage: true },
    logprobs: true, top_logprobs: 5, logprob_ids: true, ...(prefix.length ? { answer_prefix: prefix } : {}) };
}

// A new answer after the message `parent`; `tokens`: with which it begins.
export function ask(conversation, parent, tokens = []) {
  const message = add(conversation, parent, { role: "assistant", parts: [], tokens, from: tokens.length, model: model()?.id });
  return write(conversation, message, tokens.map(tokenId));
}

// Go on with an answer that ended at its limit or was stopped: the same message gets longer.
export function goOn(conversation, message) {
  message.parts = [];  // the server repeats what is given
  message.from = message.tokens.length;
  delete message.end;
  delete message.error;
  return write(conversation, message, message.tokens.map(tokenId));
}

async function write(conversation, message, prefix) {
  const abort = new AbortController(), steps = path(conversation);
  const earlier = steps.slice(0, steps.indexOf(message));
  const kept = message.tokens.length;
  running.set(conversation.id, { abort, message });
  Object.defineProperty(message, "writing", { value: true, writable: true, configurable: true });  // not stored
  emit("running");
  keep(conversation);
  let saved = Date.now();
  try {
    for await (const event of answerEvents("v1/chat/completions", state.settings.key, requestBody(earlier, prefix), abort.signal)) {
      if (event.piece) appendPiece(message, event.piece.kind, event.piece.text);
      if (event.tokens) message.tokens.push(...event.tokens.map(fromLogprob));
      if (event.end) message.end = event.end;
      if (event.usage) {
        message.usage = { tokens: event.usage.completion_tokens, seconds: event.usage.answer_seconds };
        message.dropped = event.usage.dropped_messages || 0;
      }
      message.changed = Date.now();
      if (message.changed - saved > SAVE_EVERY) { saved = message.changed; keep(conversation); }
      emit("message", conversation, message);
    }
    message.end ??= "stop";
  } catch (error) {
    if (!message.parts.length && kept) message.tokens.length = kept;
    if (abort.signal.aborted) message.end = "stopped";
    else if (!leaving) {
      message.end = "error";
      message.error = { text: error.message || "Something went wrong.", action: error.action || "retry" };
    }
  }
  message.writing = false;
  message.changed = conversation.changed = Date.now();
  if (running.get(conversation.id)?.message === message) running.delete(conversation.id);
  emit("running");
  emit("message", conversation, message);
  await keep(conversation);
  if (conversation === current()) announce(message.error?.text || "Answer: " + (textOf(message) || "empty"));
}
