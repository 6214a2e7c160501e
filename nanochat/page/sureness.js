// How sure the model was: an answer as its tokens, each coloured by the probability it had, with its alternatives.
// One token can be reached by Tab; arrow keys go to the others, Enter, a click or a tap opens the alternatives, and
// choosing one makes the answer go on from there, as another version.

import { $, button, make } from "./dom.js";
import { alternatives, level, percent, share, tokenText, visible } from "./tokens.js";

const SPECIAL = /^<\|.*\|>$/;  // the end of an answer cannot be followed by anything

// `branch(tokens)`: write another version that begins with these tokens; null while that is not possible.
export function drawTokens(body, message, branch) {
  if (body.tokensOf !== message.tokens || body.numDrawn > message.tokens.length || body.role !== "group") {
    body.replaceChildren(legend(), make("div", { className: "tokens", dir: "auto" }));
    body.role = "group";
    body.setAttribute("aria-label", "The answer's tokens with their probabilities");
    Object.assign(body, { tokensOf: message.tokens, numDrawn: 0 });
    body.lastChild.addEventListener("keydown", (event) => moveFocus(event, body.lastChild));
  }
  const box = body.lastChild;
  for (; body.numDrawn < message.tokens.length; body.numDrawn++) box.append(tokenNode(body.numDrawn, message, body));
  body.branch = branch;
}

function tokenNode(index, message, body) {
  const token = message.tokens[index], text = tokenText(token);
  const node = make("span", { className: "token", tabIndex: index === 0 ? 0 : -1, role: "button", "aria-haspopup": "dialog" }, SPECIAL.test(text) ? visible(text) : text);
  node.dataset.level = level(share(token));
  if (SPECIAL.test(text)) node.classList.add("special");
  if (index < (message.from ?? 0)) node.classList.add("given");
  node.setAttribute("aria-label", `${visible(text)}, ${share(token) === null ? "given by the tool" : percent(share(token))}`);
  const open = () => openAlternatives(node, index, message, body);
  node.addEventListener("click", open);
  node.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } });
  return node;
}

function moveFocus(event, box) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], focused = event.target.closest(".token");
  if (!step || !focused) return;
  const next = step > 0 ? focused.nextElementSibling : focused.previousElementSibling;
  if (!next) return;
  event.preventDefault();
  event.stopPropagation();
  focused.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function legend() {
  const steps = ["under 5%", "5–20%", "20–40%", "40–70%", "70–95%", "over 95%"];
  return make("div", { className: "legend" }, make("span", {}, "How likely each token was:"),
    ...steps.map((text, i) => make("span", { className: "token", "data-level": String(i) }, text)),
    make("span", { className: "token", "data-level": "forced" }, "given by a tool"));
}

// ---- the alternatives of one token ----------------------------------------------------------------------------

let opener = null;

export function closeAlternatives() {
  const box = $("alternatives");
  if (box.classList.contains("hidden")) return false;
  box.classList.add("hidden");
  opener?.focus();
  opener = null;
  return true;
}

function openAlternatives(node, index, message, body) {
  const box = $("alternatives"), token = message.tokens[index];
  opener = node;
  const rows = share(token) === null ? [] : alternatives(token).map((other) => row(other, index, message, body));
  box.replaceChildren(make("div", { className: "row" }, make("b", {}, share(token) === null ? "A tool gave this token" : "Likeliest tokens here"),
    button("×", closeAlternatives, { "aria-label": "Close" })), ...rows,
    make("p", { className: "quiet" }, body.branch ? "Choose one, and the answer goes on from it." : "Choose one when the answer is complete."));
  box.classList.remove("hidden");
  place(box, node);
  (box.querySelector("button.alternative:not(:disabled)") || box.querySelector("button")).focus();
}

function row(other, index, message, body) {
  const pick = () => {
    closeAlternatives();
    body.branch([...message.tokens.slice(0, index), [other.id, other.text, other.share, message.tokens[index][3]]]);
  };
  const impossible = other.chosen || !body.branch || other.id < 0 || SPECIAL.test(other.text);
  const item = button("", pick, { className: "alternative", disabled: impossible });
  item.append(make("span", {}, visible(other.text)), make("span", { className: "bar" }), make("span", {}, percent(other.share) + (other.chosen ? " ←" : "")));
  item.querySelector(".bar").style.setProperty("--share", String(other.share));
  return item;
}

function place(box, node) {
  const at = node.getBoundingClientRect(), own = box.getBoundingClientRect();
  box.style.left = Math.max(8, Math.min(at.left, innerWidth - own.width - 8)) + "px";
  box.style.top = (at.bottom + own.height + 12 < innerHeight ? at.bottom + 6 : Math.max(8, at.top - own.height - 6)) + "px";
}

export function setUpAlternatives() {
  const box = $("alternatives");
  document.addEventListener("pointerdown", (event) => { if (!box.contains(event.target) && !event.target.closest?.(".token")) box.classList.add("hidden"); });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const items = [...box.querySelectorAll("button.alternative:not(:disabled)")];
    items[(items.indexOf(document.activeElement) + step + items.length) % items.length]?.focus();
  });
}
