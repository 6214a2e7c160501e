// The settings: what the server does by itself stands in the empty fields; nothing changes before Save.

import { longest } from "./answers.js";
import { $, button } from "./dom.js";
import { closeMenu } from "./sidebar.js";
import { changeSettings, emit, model, on, state } from "./state.js";

const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "max_tokens", "seed"];
const FIELDS = ["system", "key", ...NUMBERS];
const PRESETS = {
  "Default": { temperature: "", top_k: "", top_p: "", min_p: "" },
  "Likeliest words": { temperature: "0", top_k: "", top_p: "", min_p: "" },
  "Careful": { temperature: "0.5", top_k: "50", top_p: "", min_p: "0.2" },
  "Free": { temperature: "1", top_k: "0", top_p: "0.95", min_p: "0" },
};

export function setUpSettings() {
  const dialog = $("settings");
  $("settings-open").addEventListener("click", () => { closeMenu(); openSettings(); });
  $("settings-cancel").addEventListener("click", () => dialog.close());
  $("presets").append(...Object.entries(PRESETS).map(([name, values]) =>
    button(name, () => { for (const [field, value] of Object.entries(values)) $(field).value = value; check(); })));
  for (const name of NUMBERS) $(name).addEventListener("input", check);
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!check()) { dialog.querySelector("[aria-invalid=true]").focus(); return; }
    const changes = {};  // only what was changed here: another tab may have changed the rest
    for (const field of FIELDS) if ($(field).value.trim() !== $(field).before) changes[field] = $(field).value.trim();
    if ($("probabilities").checked !== $("probabilities").before) changes.probabilities = $("probabilities").checked;
    dialog.close();
    changeSettings(changes);
    if ("key" in changes) emit("look");
  });
  $("theme").addEventListener("click", () => changeSettings({ theme: shownTheme() === "dark" ? "light" : "dark" }));
  $("model").addEventListener("change", () => { changeSettings({ model: $("model").value }); emit("models"); });
  on("settings", drawTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTheme);
  drawTheme();
}

export function openSettings() {
  const defaults = model()?.defaults ?? {};
  for (const field of FIELDS) {
    $(field).value = $(field).before = String(state.settings[field] ?? "");
    if (NUMBERS.includes(field)) $(field).placeholder = field === "seed" ? "another each time" : field === "max_tokens" ? String(defaults.max_tokens ?? (state.settings.max_tokens ? "" : longest()) ?? "what fits") : String(defaults[field] ?? "off");
  }
  $("probabilities").checked = $("probabilities").before = Boolean(state.settings.probabilities);
  check();
  $("settings").showModal();
}

// Mark the fields whose values the server would refuse; true if there are none.
function check() {
  let fine = true;
  for (const name of NUMBERS) {
    const field = $(name), valid = field.checkValidity();
    field.setAttribute("aria-invalid", String(!valid));
    $(`${name}-error`).textContent = valid ? "" : `From ${field.min || "any number"} to ${field.max || "any number"}${field.step === "1" ? ", a whole number" : ""}.`;
    fine &&= valid;
  }
  return fine;
}

const shownTheme = () => state.settings.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

function drawTheme() {
  document.documentElement.dataset.theme = shownTheme();
  $("theme").textContent = shownTheme() === "dark" ? "Light" : "Dark";
}
