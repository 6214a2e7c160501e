// The conversation shown: one element a message, drawn again only where that message changed.

import * as answers from "./answers.js";
import { $, announce, button, make, notice } from "./dom.js";
import { toEnd } from "./follow.js";
import { drawMessage } from "./message.js";
import { isWritten } from "./presence.js";
import { current, emit, model, on, startNew, state } from "./state.js";
import { add, path, steps } from "./tree.js";

const drawn = new Map();  // message id -> {node, from: what it was drawn from, place}

const EXAMPLES = ["Hello! Who are you?", "What is 12 + 30?", "How many r are in strawberry?"];
const BEGINNINGS = ["Once upon a time", "The sky is", "Dear friend,"];

export function setUpMessages() {
  on("current", () => { globalThis.CSS?.highlights?.delete("found"); redrawAll(); toEnd(); });
  for (const event of ["draw", "settings", "models", "elsewhere", "running"]) on(event, redrawAll);
  const waiting = new Set();  // messages that changed since the last drawing
  let cost = 0;
  on("message", (conversation, message) => {
    if (conversation !== current() || waiting.add(message).size > 1) return;
    // At most a third of the time goes into drawing, however long the text is.
    setTimeout(() => requestAnimationFrame(() => {
      const before = performance.now();
      redrawSome([...waiting]);
      waiting.clear();
      void $("log").scrollHeight;  // lays it out, which belongs to the cost
      cost = performance.now() - before;
    }), 2 * cost);
  });
}

// Only these messages, unless that changes others.
function redrawSome(messages) {
  if (messages.some((m) => m.dropped || !drawn.has(m.id))) return redrawAll();
  for (const message of messages) messageNode(current(), message, drawn.get(message.id).place);
}

export function redrawAll() {
  const conversation = current(), log = $("log"), shown = conversation ? steps(conversation) : [];
  const dropped = shown.findLast(({ message }) => message.dropped !== undefined)?.message.dropped ?? 0;
  let first = 0;  // index of the first message that was read: answers without parts are not counted among those dropped
  for (let left = dropped; left > 0 && first < shown.length; first++) left -= shown[first].message.role === "user" || shown[first].message.parts.length > 0;
  const common = { busy: answers.isRunning(conversation), flow: model()?.answers === false, probabilities: state.settings.probabilities };
  const wanted = shown.map(({ message, number, count }, index) => messageNode(conversation, message,
    { ...common, number, count, last: index === shown.length - 1, dropped: index < first, boundary: first > 0 && index === first }));
  if (!shown.length) wanted.push(emptyNode());
  wanted.forEach((node, i) => { if (log.children[i] !== node) log.insertBefore(node, log.children[i] ?? null); });
  while (log.children.length > wanted.length) log.lastChild.remove();
  const ids = new Set(shown.map(({ message }) => message.id));
  for (const id of drawn.keys()) if (!ids.has(id)) drawn.delete(id);
  log.classList.toggle("flow", common.flow);
  log.setAttribute("aria-busy", String(common.busy));
}

function emptyNode() {
  const chat = model()?.answers ?? true, examples = chat ? EXAMPLES : BEGINNINGS;
  return make("div", { className: "empty" },
    make("p", {}, chat ? "Ask your model something." : "This is a base model: it continues a text. Begin one, or take one of these."),
    ...examples.map((text) => button(text, () => send(text))));
}

// An element is drawn again when something it depends on has changed. The text of an answer is compared by its length:
// while it is written it only grows.
function messageNode(conversation, message, place) {
  const { tokens, parts, text, end, error, usage, changed, writing } = message, editing = state.drafts.has("edit/" + message.id);
  const from = JSON.stringify([place, text ?? parts.map((p) => [p.kind, p.text.length]), tokens?.length, end, error, usage, !writing && changed, editing, isWritten(message)]);
  const old = drawn.get(message.id);
  if (old?.from === from) return old.node;
  const node = old?.node ?? make("article", { className: "message " + message.role });
  drawMessage(node, conversation, message, place);
  drawn.set(message.id, { node, from, place });
  return node;
}

// Send the text as the next message of the conversation shown. Returns whether it was sent.
export function send(text) {
  const conversation = current() ?? startNew();
  if (answers.isRunning(conversation)) { notice("An answer is being written; stop it first."); return false; }
  const last = path(conversation).at(-1);
  if (last && isWritten(last)) { notice("Another tab is writing an answer here; wait for its end."); return false; }
  answers.ask(conversation, add(conversation, last?.id ?? null, { role: "user", text }).id);
  emit("list");
  toEnd();
  return true;
}

// ---- what was searched for ------------------------------------------------------------------------------------------

// Scroll to the words in a message and mark them.
export function showFound(message, words) {
  const node = drawn.get(message.id)?.node;
  if (!node) return;
  const ranges = rangesOf(node, words), place = ranges[0]?.startContainer.parentElement ?? node;
  if (globalThis.Highlight) CSS.highlights.set("found", new Highlight(...ranges));
  place.scrollIntoView({ block: "center" });
  node.tabIndex = -1;
  node.focus({ preventScroll: true });
  announce("Found: " + words);
}

function rangesOf(node, words) {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT), ranges = [];
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const lower = text.data.toLowerCase();
    for (let at = lower.indexOf(words); at >= 0 && at + words.length <= text.length; at = lower.indexOf(words, at + words.length)) {
      const range = new Range();
      range.setStart(text, at);
      range.setEnd(text, at + words.length);
      ranges.push(range);
    }
  }
  return ranges;
}
