// Keyboard shortcuts, and the list of them.

import * as answers from "./answers.js";
import { $, make } from "./dom.js";
import { changeSettings, current, state } from "./state.js";
import { openSettings } from "./settings.js";
import { closeMenu, newChat, openMenu } from "./sidebar.js";
import { closeAlternatives } from "./sureness.js";

const mac = /Mac|iPhone|iPad/.test(navigator.platform);
const MOD = mac ? "⌘" : "Ctrl";

const mod = (event) => (mac ? event.metaKey : event.ctrlKey) && !event.altKey && !event.shiftKey;
const plain = (event) => !event.ctrlKey && !event.metaKey && !event.altKey && !event.target.closest?.("input, textarea, select");

// [keys to show, what they do, test of the event, action]; single letters do not work while text is written.
const SHORTCUTS = [
  [`${MOD}+K`, "New conversation", (e) => mod(e) && e.key.toLowerCase() === "k", newChat],
  ["/", "Write a message", (e) => plain(e) && e.key === "/", () => $("text").focus()],
  [`${MOD}+/`, "Search conversations", (e) => mod(e) && e.key === "/", () => { openMenu(); $("search").focus(); }],
  ["P", "Show how sure the model was, or stop showing it", (e) => plain(e) && e.key.toLowerCase() === "p", () => changeSettings({ probabilities: !state.settings.probabilities })],
  [`${MOD}+,`, "Settings", (e) => mod(e) && e.key === ",", openSettings],
  ["?", "These shortcuts", (e) => plain(e) && e.key === "?", () => $("keys").showModal()],
  ["Esc", "Close what is open, or stop the answer", (e) => e.key === "Escape", () => closeAlternatives() || closeMenu() || answers.stop(current())],
  ["Enter", "Send; on a touch screen: a new line", () => false, null],
  ["Shift+Enter", "A new line", () => false, null],
  ["← →", "Among tokens: the one before or after", () => false, null],
];

export function setUpKeys() {
  $("keys-open").addEventListener("click", () => $("keys").showModal());
  $("keys-rows").append(...SHORTCUTS.map(([keys, text]) => make("tr", {}, make("th", { scope: "row" }, make("kbd", {}, keys)), make("td", {}, text))));
  document.addEventListener("keydown", (event) => {
    // In an open dialog or menu the keys are its own; Escape closes it.
    if (event.isComposing || event.keyCode === 229 || document.querySelector("dialog[open], :popover-open")) return;
    const found = SHORTCUTS.find(([, , test]) => test(event));
    if (!found) return;
    event.preventDefault();
    found[3]();
  });
  for (const dialog of document.querySelectorAll("dialog")) {
    for (const closing of dialog.querySelectorAll("[data-close]")) closing.addEventListener("click", () => dialog.close());
  }
}
