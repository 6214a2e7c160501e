// The server's models, looked for again until there is one, and the card of the one in use.

import { $, announce, button, make } from "./dom.js";
import { openSettings } from "./settings.js";
import { emit, model, on, state } from "./state.js";
import { getJson } from "./stream.js";

const LOOK_AGAIN = 3000, LOOK_LATER = 30_000;  // ms without and with a server
let timer = null;

export function setUpModels() {
  on("look", look);
  on("models", draw);
  draw();
  $("card-open").addEventListener("click", () => { drawCard(); $("card").showModal(); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  return look();
}

async function look() {
  clearTimeout(timer);
  const before = JSON.stringify(state.models);
  let trouble = null;
  try { state.models = (await getJson("v1/models", state.settings.key)).data; }
  catch (error) { trouble = error; }
  tell(trouble);
  if (JSON.stringify(state.models) !== before) emit("models");
  if (!document.hidden) timer = setTimeout(look, trouble ? LOOK_AGAIN : LOOK_LATER);
}

// Say why there is no model; said again only when it changes, since screen readers read it aloud.
function tell(trouble) {
  const box = $("trouble"), text = trouble?.message ?? "";
  if (box.textContent.startsWith(text) && Boolean(text) === !box.classList.contains("hidden")) return;
  box.replaceChildren(make("span", {}, text));
  if (trouble?.action === "settings") box.append(button("Open settings", openSettings));
  box.classList.toggle("hidden", !text);
  if (!text) announce("The server is there.");
}

function draw() {
  const select = $("model"), models = state.models ?? [];
  select.replaceChildren(...models.map((m) => make("option", { value: m.id }, m.id)));
  if (!models.length) select.append(make("option", { value: "" }, "no model"));
  if (model()) select.value = model().id;
  select.disabled = models.length < 2;
  $("card-open").disabled = !models.length;
}

const LABELS = { stage: "Last stage of training", step: "Step", run: "Run", parameters: "Parameters", layers: "Layers", tokens: "Tokens in that stage",
  max_context: "Context, in tokens", vocab_size: "Tokenizer's vocabulary", val_bpb: "Validation bits per byte" };
const STAGES = { base: "pretraining (it continues texts)", sft: "finetuning on conversations", rl: "reinforcement learning" };

function drawCard() {
  const card = { ...model()?.card, max_context: model()?.max_context }, rows = [];
  for (const [name, label] of Object.entries(LABELS)) {
    const value = card[name];
    if (value === undefined || value === null) continue;
    const shown = name === "stage" ? STAGES[value] ?? value : typeof value === "number" ? value.toLocaleString(undefined, { maximumFractionDigits: 4 }) : String(value);
    rows.push(make("tr", {}, make("th", { scope: "row" }, label), make("td", {}, shown)));
  }
  $("card-name").textContent = model()?.id ?? "No model";
  $("card-rows").replaceChildren(...rows);
}
