// How sure the model was: an answer as its tokens, each coloured by the probability it had, with its alternatives.
// One token can be reached by Tab; arrow keys go to the others, Enter, a click or a tap opens the alternatives, and
// choosing one makes the answer go on from there, as another version.

import { $, button, make, withoutOverrides } from "./dom.js";
import { on } from "./state.js";
import { alternatives, canFollow, isSpecial, level, percent, share, shownText, tokenName } from "./tokens.js";

// `branch(tokens)`: write another version that begins with these tokens.
export function drawTokens(body, message, branch) {
  if (body.tokensOf !== message.tokens || body.numDrawn > message.tokens.length || body.role !== "group") {
    const box = make("div", { className: "tokens", dir: "auto" });
    box.addEventListener("click", (event) => openAlternatives(event.target.closest(".token"), message, body));
    box.addEventListener("keydown", (event) => onKey(event, message, body));
    body.replaceChildren(legend(message), box);
    body.role = "group";
    body.setAttribute("aria-label", "The answer's tokens with their probabilities");
    Object.assign(body, { tokensOf: message.tokens, numDrawn: 0, textOfNext: shownText() });
  }
  for (; body.numDrawn < message.tokens.length; body.numDrawn++) body.lastChild.append(tokenNode(body.numDrawn, message, body));
  body.branch = branch;
}

function tokenNode(index, message, body) {
  const token = message.tokens[index], text = withoutOverrides(body.textOfNext(token));
  const node = make("span", { className: "token", tabIndex: index === 0 ? 0 : -1, role: "button", "aria-haspopup": "dialog" }, text || "·");
  node.dataset.level = level(share(token));
  if (isSpecial(token)) node.classList.add("special");
  if (!text) node.classList.add("part");  // of a character that a later token completes
  if (index < (message.from ?? 0)) node.classList.add("given");
  node.setAttribute("aria-label", `${tokenName(token)}, ${share(token) === null ? "given by the tool" : percent(share(token))}`);
  return node;
}

function onKey(event, message, body) {
  const focused = event.target.closest(".token"), box = body.lastChild;
  const next = { ArrowRight: focused?.nextElementSibling, ArrowLeft: focused?.previousElementSibling, Home: box.firstChild, End: box.lastChild }[event.key];
  if (focused && (event.key === "Enter" || event.key === " ")) openAlternatives(focused, message, body);
  else if (focused && next) moveTo(next, focused);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function moveTo(next, from) {
  from.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function legend(message) {
  const steps = ["under 5%", "5–20%", "20–40%", "40–70%", "70–95%", "over 95%"];
  return make("div", { className: "legend" }, make("span", {}, "How likely each token was; choose one to see others:"),
    ...steps.map((text, i) => make("span", { className: "token", "data-level": String(i) }, text)),
    make("span", { className: "token", "data-level": "forced" }, "given by a tool"),
    message.from ? make("span", { className: "token given" }, "kept from an earlier version") : null);
}

// ---- the alternatives of one token ----------------------------------------------------------------------------

let opener = null;  // the token whose alternatives are shown

export function closeAlternatives() {
  const box = $("alternatives");
  if (box.classList.contains("hidden")) return false;
  hide();
  opener?.focus();
  opener = null;
  return true;
}

function hide() {
  $("alternatives").classList.add("hidden");
  opener?.removeAttribute("aria-expanded");
}

function openAlternatives(node, message, body) {
  if (!node) return;
  const box = $("alternatives"), index = [...body.lastChild.children].indexOf(node), token = message.tokens[index], forced = share(token) === null;
  for (const other of body.lastChild.querySelectorAll('.token[tabindex="0"]')) other.tabIndex = -1;
  node.tabIndex = 0;
  hide();
  opener = node;
  opener.setAttribute("aria-expanded", "true");
  const rows = forced ? [] : alternatives(token).map((other) => row(other, index, message, body));
  box.replaceChildren(make("div", { className: "row" }, make("b", {}, forced ? "A tool gave this token" : "Likeliest tokens here"),
    button("×", closeAlternatives, { "aria-label": "Close" })), ...rows,
    make("p", { className: "quiet" }, forced ? "The model did not choose it." : "Choose another one, and the answer goes on from it as a new version."));
  box.classList.remove("hidden");
  place(box, node);
  (box.querySelector("button.alternative:not(:disabled)") || box.querySelector("button")).focus();
}

function row(other, index, message, body) {
  const pick = () => {
    closeAlternatives();
    body.branch([...message.tokens.slice(0, index), [other.id, other.text, other.share, message.tokens[index][3]]]);
  };
  const item = button("", pick, { className: "alternative", disabled: other.chosen || !canFollow(other) });
  item.append(make("span", {}, tokenName([other.id, other.text])), make("span", { className: "bar" }), make("span", {}, percent(other.share) + (other.chosen ? " ←" : "")));
  item.querySelector(".bar").style.setProperty("--share", String(other.share));
  if (other.chosen) item.setAttribute("aria-current", "true");
  return item;
}

function place(box, node) {
  const at = node.getBoundingClientRect(), own = box.getBoundingClientRect();
  box.style.left = Math.max(8, Math.min(at.left, innerWidth - own.width - 8)) + "px";
  const below = at.bottom + 6, top = below + own.height + 8 < innerHeight ? below : at.top - own.height - 6;
  box.style.top = Math.max(8, Math.min(top, innerHeight - own.height - 8)) + "px";
}

export function setUpAlternatives() {
  for (const event of ["current", "settings"]) on(event, hide);  // its token may no longer be shown
  const box = $("alternatives");
  document.addEventListener("pointerdown", (event) => { if (!box.contains(event.target) && !event.target.closest?.(".token")) hide(); });
  $("log").addEventListener("scroll", () => { if (opener?.isConnected && !box.classList.contains("hidden")) place(box, opener); }, { passive: true });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const items = [...box.querySelectorAll("button.alternative:not(:disabled)")];
    items[(items.indexOf(document.activeElement) + step + items.length) % items.length]?.focus();
  });
}
