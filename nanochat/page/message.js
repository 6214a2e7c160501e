// One message as an element: its text, versions, buttons, and what else is to be said of it.

import * as answers from "./answers.js";
import { $, button, copyText, isSendKey, make, notice, touchScreen, withoutOverrides } from "./dom.js";
import { toEnd } from "./follow.js";
import { drawMarkdown } from "./markdown.js";
import { isWritten } from "./presence.js";
import { changeSettings, emit, keep, keepDraft, model, state } from "./state.js";
import { drawTokens } from "./sureness.js";
import { add, chooseVersion, path, textOf } from "./tree.js";

const draftOf = (message) => "edit/" + message.id;

// `place`: {number, count, last, busy, flow, probabilities, dropped, boundary}; in a flow, a base model's text, there are
// no headings, and an answer is plain text.
export function drawMessage(node, conversation, message, place) {
  const own = message.role === "user", editing = own && state.drafts.has(draftOf(message));
  const body = node.querySelector(":scope > .body") ?? make("div", { className: "body" }), name = own ? (place.flow ? "Your text" : "You") : message.model || "nanochat";
  node.setAttribute("aria-label", name);
  node.dataset.message = message.id;
  const drawnAs = JSON.stringify(place);
  if (message.writing && node.drawnAs === drawnAs) return drawAnswer(body, conversation, message, place);  // its buttons stay, even pressed ones
  node.drawnAs = message.writing && drawnAs;
  for (const [mark, value] of Object.entries({ dropped: place.dropped, boundary: place.boundary, editing })) node.classList.toggle(mark, value);
  if (editing) editor(body, conversation, message);
  else if (own) { body.replaceChildren(withoutOverrides(message.text)); body.setAttribute("dir", "auto"); }
  else drawAnswer(body, conversation, message, place);
  const above = place.boundary ? make("div", { className: "note" }, `The model no longer reads what is above: it does not fit in its ${model()?.max_context ?? ""} tokens.`) : null;
  const head = place.flow ? null : make("div", { className: "who", title: new Date(message.made).toLocaleString() }, name);
  const rest = editing ? [] : [actions(conversation, message, place), ...notes(conversation, message, place)];
  const focused = node.contains(document.activeElement) ? labelOf(document.activeElement) : null;
  for (const child of [...node.children]) if (child !== body) child.remove();
  if (body.parentNode !== node) node.append(body);
  for (const child of [above, head]) if (child) node.insertBefore(child, body);
  node.append(...rest);
  if (focused && !node.contains(document.activeElement)) focusButton(node, focused);
}

const labelOf = (element) => element.getAttribute("aria-label") || element.textContent;
const focusButton = (node, ...labels) => labels.map((label) => [...node.querySelectorAll(".actions button:enabled")].find((b) => labelOf(b) === label)).find(Boolean)?.focus();
const nodeOf = (message) => $("log").querySelector(`[data-message="${CSS.escape(message.id)}"]`);

// ---- answers --------------------------------------------------------------------------------------------------------

function drawAnswer(body, conversation, message, place) {
  const waiting = !message.parts.length && isWritten(message);
  body.classList.toggle("waiting", waiting);
  if (waiting) body.dataset.waiting = "The model reads…"; else delete body.dataset.waiting;
  if (place.probabilities && message.tokens?.length) {
    body.drawnParts = null;
    return drawTokens(body, message, (tokens) => answers.branch(conversation, message, tokens));
  }
  if (!body.drawnParts) { body.replaceChildren(); body.removeAttribute("role"); body.removeAttribute("aria-label"); body.drawnParts = []; }
  if (place.flow) return drawPlain(body, withoutOverrides(textOf(message)));
  message.parts.forEach((part, i) => drawPart(body, part, i, message.end !== undefined || i < message.parts.length - 1));
  for (const box of body.drawnParts.splice(message.parts.length)) box.remove();
}

function drawPart(body, part, i, complete) {
  let box = body.drawnParts[i];
  if (!box || box.kind !== part.kind) {
    box = Object.assign(make("div", { className: part.kind === "text" ? "text" : "tool" }), { kind: part.kind });
    if (body.drawnParts[i]) body.drawnParts[i].replaceWith(box); else body.append(box);
    body.drawnParts[i] = box;
  }
  if (box.shown === part.text && box.complete === complete) return;
  Object.assign(box, { shown: part.text, complete });
  if (part.kind === "text") drawMarkdown(box, part.text, complete);
  else box.replaceChildren(make("b", {}, part.kind === "python" ? "Tool call" : "Tool's answer"), make("span", {}, withoutOverrides(part.text)));
}

// Text that only grows is added to, so that a selection in it stays.
function drawPlain(body, text) {
  const node = body.firstChild, grows = body.childNodes.length === 1 && node.nodeType === Node.TEXT_NODE && text.startsWith(node.data);
  if (grows) node.appendData(text.slice(node.data.length)); else body.replaceChildren(text);
}

// ---- buttons --------------------------------------------------------------------------------------------------------

function actions(conversation, message, { number, count, last, busy, flow }) {
  const bar = make("div", { className: "actions" }), own = message.role === "user";
  if (count > 1) {
    bar.append(button("‹", () => turn(conversation, message, -1), { "aria-label": "Earlier version", disabled: number === 1 }),
      make("span", { className: "version" }, `${number}/${count}`),
      button("›", () => turn(conversation, message, 1), { "aria-label": "Later version", disabled: number === count }));
  }
  if (message.writing || message.error && !message.parts.length) return bar;
  const copy = button("Copy", () => copyText(flow && last ? path(conversation).map(textOf).join("") : textOf(message), copy));
  if ((!flow || last) && textOf(message)) bar.append(copy);
  if (own) bar.append(button("Edit", () => edit(message, message.text)));
  else if ((!flow || last) && !message.error) bar.append(button("Try again", () => { answers.ask(conversation, message.parent); toEnd(); }, { disabled: busy }));
  const early = ["length", "stopped"].includes(message.end) || message.end === "error" && message.parts.length > 0;
  if (early && !own && !flow) bar.append(button("Continue", () => answers.goOn(conversation, message), { disabled: busy || !last }));
  if (message.tokens?.length && (!flow || last)) {
    const shown = state.settings.probabilities;
    bar.append(button("How sure?", () => changeSettings({ probabilities: !shown }), { "aria-pressed": String(shown), title: "Show how likely each token was" }));
  }
  if (message.usage && (!flow || last)) {
    const { tokens, seconds } = message.usage, written = message.tokens?.length || tokens;  // `tokens`: of the last run alone
    const rate = seconds > 0 && tokens > 1 ? `, ${((tokens - 1) / seconds).toFixed(tokens / seconds < 10 ? 1 : 0)} tokens/s` : "";
    bar.append(make("span", { className: "rate" }, `${written} token${written === 1 ? "" : "s"}${rate}`));
  }
  return bar;
}

// Show the version before or after this one; the keyboard's focus stays on the button.
function turn(conversation, message, step) {
  const next = chooseVersion(conversation, message, step), labels = ["Earlier version", "Later version"];
  keep(conversation);
  emit("draw");
  if (next) focusButton(nodeOf(next), ...(step < 0 ? labels : labels.reverse()));
}

// ---- what is said below it ------------------------------------------------------------------------------------------

function notes(conversation, message, { busy, flow, last }) {
  const found = [];
  const say = (text) => found.push(make("div", { className: "note" }, text));
  if (message.cut && flow && last) say(`The model read only the end of the text: ${message.cut.toLocaleString()} characters at its beginning do not fit in its context.`);
  if (message.end === "length" && !flow) say("The answer ended at the limit of tokens.");
  if (message.end === "stopped" && !flow) say("You stopped this answer.");
  if (message.end === "stop" && flow && last) say("The model ended the text here.");
  if (message.role === "assistant" && !message.writing && isWritten(message)) say("Another tab is writing this answer.");
  if (message.error) {
    const doing = { settings: ["Open settings", () => $("settings-open").click()], models: ["Look again", () => emit("look")] }[message.error.action];
    const box = make("div", { className: "error" }, make("span", {}, message.error.text));
    if (doing) box.append(button(...doing));
    const asked = conversation.messages[message.parent];
    const given = message.parts.length || message.model !== model()?.id ? [] : message.tokens?.slice(0, message.from ?? 0);  // of a branch
    if (message.error.action === "shorten" && asked) box.append(button("Edit", () => edit(asked, asked.text)));
    else box.append(button("Try again", () => { answers.ask(conversation, message.parent, given); toEnd(); }, { disabled: busy }));
    found.push(box);
  }
  return found;
}

// ---- editing --------------------------------------------------------------------------------------------------------
// The conversation changes only on Send, and the earlier text stays as a version. What is typed is kept as a draft.

function edit(message, text) {
  keepDraft(draftOf(message), text);
  emit("draw");
  nodeOf(message)?.querySelector("textarea").focus();
}

function endEditing(message) {
  keepDraft(draftOf(message), null);
  emit("draw");
  const node = nodeOf(message);
  if (node) focusButton(node, "Edit");
}

function editor(body, conversation, message) {
  if (body.querySelector("textarea")) return;
  const text = state.drafts.get(draftOf(message));
  const area = make("textarea", { value: text, rows: Math.min(12, text.split("\n").length + 1), dir: "auto", "aria-label": "Edit your message" });
  const cancel = () => {
    const typed = area.value;
    endEditing(message);
    if (typed !== message.text) notice("What you typed there was dropped.", "Undo", () => edit(message, typed));
  };
  const send = () => {
    const changed = model()?.answers === false ? area.value : area.value.trim();
    if (!changed) return;
    if (answers.isRunning(conversation)) return void notice("An answer is being written; stop it first.");
    keepDraft(draftOf(message), null);
    answers.ask(conversation, add(conversation, message.parent, { role: "user", text: changed }).id);
    toEnd();
    if (!touchScreen.matches) $("text").focus();  // which would open the keyboard over the answer
  };
  area.addEventListener("input", () => keepDraft(draftOf(message), area.value));
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (isSendKey(event)) { event.preventDefault(); send(); }
  });
  body.replaceChildren(area, make("div", { className: "row" }, button("Cancel", cancel), button("Send", send, { className: "primary" })));
}
