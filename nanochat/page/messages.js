// The conversation shown: one element a message, redrawn only where that message changed.

import * as answers from "./answers.js";
import { $, announce, button, copyText, make, withoutOverrides } from "./dom.js";
import { follow, toEnd } from "./follow.js";
import { drawMarkdown } from "./markdown.js";
import { current, emit, keep, model, on, startNew, state } from "./state.js";
import { drawTokens } from "./sureness.js";
import { add, chooseVersion, path, textOf, version } from "./tree.js";

const drawn = new Map();  // message id -> {node, state: what it was drawn from}
let editing = null;  // id of the message whose text is being edited

const EXAMPLES = ["Hello! Who are you?", "What is 12 + 30?", "How many r are in strawberry?"];
const BEGINNINGS = ["Once upon a time", "The sky is", "Dear friend,"];

export function setUpMessages() {
  on("current", () => { editing = null; redrawAll(); toEnd(); });
  for (const event of ["settings", "models", "elsewhere"]) on(event, redrawAll);
  on("running", redrawAll);
  let pending = null;
  on("message", (conversation) => {
    if (conversation !== current() || pending) return;
    pending = requestAnimationFrame(() => { pending = null; redrawAll(); });
  });
}

export function redrawAll() {
  const conversation = current(), log = $("log"), steps = conversation ? path(conversation) : [];
  const dropped = steps.findLast((m) => m.dropped !== undefined)?.dropped ?? 0;
  const wanted = steps.map((message, index) => messageNode(conversation, message, steps, index, dropped));
  if (!steps.length) wanted.push(emptyNode());
  wanted.forEach((node, i) => { if (log.children[i] !== node) log.insertBefore(node, log.children[i] ?? null); });
  while (log.children.length > wanted.length) log.lastChild.remove();
  for (const id of drawn.keys()) if (!steps.some((m) => m.id === id)) drawn.delete(id);
  log.setAttribute("aria-busy", String(answers.isRunning(conversation)));
  follow();
}

function emptyNode() {
  const chat = model()?.answers ?? true, examples = chat ? EXAMPLES : BEGINNINGS;
  const say = (text) => { $("text").value = text; $("ask").requestSubmit(); };
  return make("div", { className: "empty" },
    make("p", {}, chat ? "Ask your model something." : "This is a base model: it continues a text. Begin one, or take one of these."),
    ...examples.map((text) => button(text, () => say(text))));
}

// Everything a message's element depends on, to know whether to draw it again. The text of an answer is compared by its
// length: while it is written it only grows.
function drawnFrom(message, place) {
  const { tokens, parts, text, end, error, usage } = message;
  return JSON.stringify([place, text ?? parts.map((p) => [p.kind, p.text.length]), tokens?.length, end, error, usage, message.changed * !message.writing,
    editing === message.id, state.settings.probabilities, answers.isWritten(message)]);
}

function messageNode(conversation, message, steps, index, dropped) {
  const place = [version(conversation, message), index === steps.length - 1, answers.isRunning(conversation), index < dropped, index === dropped && dropped > 0];
  const from = drawnFrom(message, place), old = drawn.get(message.id);
  if (old?.from === from) return old.node;
  const node = old?.node ?? make("article", { className: "message " + message.role });
  node.setAttribute("aria-label", message.role === "user" ? "You" : message.model || "nanochat");
  node.classList.toggle("dropped", index < dropped);
  node.classList.toggle("boundary", index === dropped && dropped > 0);
  fill(node, conversation, message, place);
  drawn.set(message.id, { node, from });
  return node;
}

function fill(node, conversation, message, [[number, count], last, busy, , boundary]) {
  const body = node.querySelector(":scope > .body") ?? make("div", { className: "body" });
  const own = message.role === "user", continuing = model() && !model().answers;
  if (own && editing === message.id) editor(body, conversation, message);
  else if (own) { body.replaceChildren(withoutOverrides(message.text)); body.setAttribute("dir", "auto"); }
  else drawAnswer(body, conversation, message);
  const above = boundary ? make("div", { className: "note" }, `The model no longer reads what is above: it does not fit in its ${model()?.max_context ?? ""} tokens.`) : null;
  const head = make("div", { className: "who" }, own ? (continuing ? "Your text" : "You") : message.model || "nanochat");
  const rest = own && editing === message.id ? [] : [actions(conversation, message, number, count, last, busy), ...notes(conversation, message, busy)];
  for (const child of [...node.children]) if (child !== body) child.remove();
  if (body.parentNode !== node) node.append(body);
  if (above) node.insertBefore(above, body);
  node.insertBefore(head, body);
  node.append(...rest);
}

function drawAnswer(body, conversation, message) {
  if (state.settings.probabilities && message.tokens?.length) {
    body.drawnParts = null;
    return drawTokens(body, message, answers.isRunning(conversation) ? null : (tokens) => answers.ask(conversation, message.parent, tokens));
  }
  if (!body.drawnParts) { body.replaceChildren(); body.removeAttribute("role"); body.drawnParts = []; }
  message.parts.forEach((part, i) => {
    let box = body.drawnParts[i];
    if (!box || box.kind !== part.kind) {
      box = Object.assign(make("div", { className: part.kind === "text" ? "text" : "tool" }), { kind: part.kind });
      if (body.drawnParts[i]) body.drawnParts[i].replaceWith(box); else body.append(box);
      body.drawnParts[i] = box;
    }
    if (part.kind === "text") drawMarkdown(box, part.text, message.end !== undefined || i < message.parts.length - 1);
    else if (box.shown !== part.text) {
      box.shown = part.text;
      box.replaceChildren(make("b", {}, part.kind === "python" ? "Tool call" : "Tool's answer"), make("span", {}, withoutOverrides(part.text)));
    }
  });
  for (const box of body.drawnParts.splice(message.parts.length)) box.remove();
  const waiting = !message.parts.length && answers.isWritten(message);
  body.classList.toggle("waiting", waiting);
  if (waiting) body.dataset.waiting = "The model reads…"; else delete body.dataset.waiting;
}

function actions(conversation, message, number, count, last, busy) {
  const bar = make("div", { className: "actions" });
  if (count > 1) {
    const turn = (step) => { chooseVersion(conversation, message, step); keep(conversation); redrawAll(); };
    bar.append(button("‹", () => turn(-1), { "aria-label": "Earlier version", disabled: number === 1 }),
      make("span", { className: "version" }, `${number}/${count}`),
      button("›", () => turn(1), { "aria-label": "Later version", disabled: number === count }));
  }
  if (message.writing) return bar;
  const copy = button("Copy", () => copyText(textOf(message), copy));
  bar.append(copy);
  if (message.role === "user") bar.append(button("Edit", () => { editing = message.id; redrawAll(); }));
  else bar.append(button("Try again", () => { answers.ask(conversation, message.parent); toEnd(); }, { disabled: busy }));
  if (message.end === "length" || message.end === "stopped") {
    bar.append(button("Continue", () => answers.goOn(conversation, message), { disabled: busy || !last || !message.tokens?.length }));
  }
  if (message.usage) {
    const { tokens, seconds } = message.usage;
    const rate = seconds > 0 && tokens > 1 ? `, ${((tokens - 1) / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} tokens/s` : "";
    bar.append(make("span", { className: "rate" }, `${tokens} token${tokens === 1 ? "" : "s"}${rate}`));
  }
  return bar;
}

// What is to be said of an answer besides its text.
function notes(conversation, message, busy) {
  const found = [];
  const say = (text) => found.push(make("div", { className: "note" }, text));
  if (message.end === "length") say("The answer ended at the limit of tokens.");
  if (message.end === "stopped") say("You stopped this answer.");
  if (message.end === undefined && message.role === "assistant" && !message.writing) {
    if (answers.isWritten(message)) say("Another tab is writing this answer.");
    else message.error = { text: "The page was closed before the answer was complete.", action: "retry" };
  }
  if (message.error) {
    const doing = { settings: ["Open settings", () => $("settings-open").click()], models: ["Look again", () => emit("look")] }[message.error.action];
    const again = button("Try again", () => answers.ask(conversation, message.parent), { disabled: busy });
    const box = make("div", { className: "error", role: "alert" }, make("span", {}, message.error.text));
    if (doing) box.append(button(...doing));
    box.append(again);
    found.push(box);
  }
  return found;
}

// Editing opens in place; the conversation changes only on Send, and the earlier text stays as a version.
function editor(body, conversation, message) {
  if (body.querySelector("textarea")) return;
  const area = make("textarea", { value: message.text, rows: Math.min(12, message.text.split("\n").length + 1), "aria-label": "Edit your message" });
  const close = () => { editing = null; redrawAll(); };
  const send = () => {
    const text = area.value.trim();
    if (!text || answers.isRunning(conversation)) return;
    editing = null;
    answers.ask(conversation, add(conversation, message.parent, { role: "user", text }).id);
    toEnd();
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  });
  body.replaceChildren(area, make("div", { className: "row" }, button("Cancel", close), button("Send", send, { className: "primary" })));
  area.focus();
}

// Send the text as the next message of the conversation shown. Returns whether it was sent.
export function send(text) {
  const conversation = current() ?? startNew();
  if (answers.isRunning(conversation)) { announce("An answer is being written; stop it first."); return false; }
  const last = path(conversation).at(-1);
  answers.ask(conversation, add(conversation, last?.id ?? null, { role: "user", text }).id);
  emit("list");
  toEnd();
  return true;
}

