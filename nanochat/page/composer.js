// Where a message is written: it grows with its text, is kept as a draft, and counts its tokens against the context.

import * as answers from "./answers.js";
import { $, announce, isSendKey, touchScreen } from "./dom.js";
import { send } from "./messages.js";
import { current, keepDraft, model, on, state } from "./state.js";
import { getJson } from "./stream.js";
import { path } from "./tree.js";

const COUNT_AFTER = 400;  // ms without typing
const MAX_CHARS = 200_000;  // that the server takes in one request
let stopShown = 0, counting = null, timer = null, draftOf = null;

const NEW = "new";  // the draft of a conversation that has no messages yet
const draftKey = () => current() && Object.keys(current().messages).length ? current().id : NEW;

export function setUpComposer() {
  const text = $("text");
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("stop").addEventListener("click", () => {  // it appears where Send was: the second click of a double click is not meant
    if (performance.now() - stopShown > 400) answers.stop(current());
  });
  text.addEventListener("input", () => { grow(); keepDraft(draftOf, text.value || null); countSoon(); });
  text.addEventListener("keydown", (event) => {
    if (!isSendKey(event)) return;
    event.preventDefault();
    submit();
  });
  addEventListener("resize", grow);  // lines wrap elsewhere
  on("current", showDraft);
  on("running", showRunning);
  on("models", () => {
    const chat = model()?.answers ?? true;
    text.placeholder = chat ? "Write a message" : "Write what comes next, or let the model go on";
    $("send").textContent = chat ? "Send" : "Continue";
    grow();
    countSoon();
  });
  on("settings", countSoon);
  showDraft();
}

function showDraft() {
  draftOf = draftKey();
  $("text").value = state.drafts.get(draftOf) ?? "";
  grow();
  showRunning();
  countSoon();
}

function submit() {
  const value = $("text").value, chat = model()?.answers ?? true, text = chat ? value.trim() : value;
  const last = !chat && !text && current() && path(current()).at(-1);
  if (last) return void answers.goOn(current(), last);  // a base model adds to its text
  if (!text) return;
  if (text.length > MAX_CHARS) { count(); announce(tooLong(text)); return; }
  const key = draftOf;
  if (!send(text)) return;
  $("text").value = "";
  draftOf = draftKey();
  keepDraft(key, null);
  grow();
  countSoon();
}

function showRunning() {
  const busy = answers.isRunning(current());
  $("send").classList.toggle("hidden", busy);
  if (busy && $("stop").classList.contains("hidden")) stopShown = performance.now();
  $("stop").classList.toggle("hidden", !busy);
  if (!touchScreen.matches && document.activeElement?.matches("#send.hidden, #stop.hidden")) $("text").focus();
}

// Long texts have a fixed height: measuring them at every key would take longer than typing.
export function grow() {
  const text = $("text");
  if (text.value.length > 20_000) { text.style.height = "40dvh"; return; }
  text.style.height = "auto";
  text.style.height = text.scrollHeight + "px";
}

const tooLong = (text) => `${text.length.toLocaleString()} characters: the server takes ${MAX_CHARS.toLocaleString()}. Shorten the message.`;

function countSoon() {
  clearTimeout(timer);
  timer = setTimeout(count, COUNT_AFTER);
}

async function count() {
  const text = $("text").value, limit = model()?.max_context, box = $("counter");
  counting?.abort();
  if (!text || !limit) { box.textContent = ""; box.classList.remove("over"); return; }
  if (text.length > MAX_CHARS) { box.textContent = tooLong(text); box.classList.add("over"); return; }
  counting = new AbortController();
  try {
    const { count: tokens } = await getJson("tokenize", state.settings.key, { text }, counting.signal);
    const earlier = current() && (model()?.answers ?? true) ? path(current()).findLast((m) => m.usage?.total)?.usage.total ?? 0 : 0;
    const said = tokens >= limit ? ": too long for this model" : earlier + tokens >= limit ? ": the oldest messages will be left out" : "";
    box.textContent = `${tokens.toLocaleString()}${earlier ? ` + ${earlier.toLocaleString()} before` : ""} of ${limit.toLocaleString()} tokens${said}`;
    box.classList.toggle("over", said !== "");
    box.title = "What is written here and the conversation before it, against what the model can read at once.";
  } catch (error) { if (error.name !== "AbortError") box.textContent = ""; }
}

