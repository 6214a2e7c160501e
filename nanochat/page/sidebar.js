// The list of conversations: search, rename, export, delete.

import * as answers from "./answers.js";
import { $, announce, button, download, make, notice, withoutOverrides } from "./dom.js";
import { emit, keep, listed, on, remove, show, startNew, state } from "./state.js";
import { addImported, fileName, fromFile, toJson, toMarkdown } from "./transfer.js";
import { textOf } from "./tree.js";

export function setUpSidebar() {
  for (const event of ["list", "current", "running"]) on(event, drawList);
  $("search").addEventListener("input", drawList);
  $("new").addEventListener("click", newChat);
  $("export-all").addEventListener("click", () => download("nanochat-conversations.json", toJson(listed()), "application/json"));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    for (const file of $("import-file").files) await importFile(file);
    $("import-file").value = "";
  });
}

export function newChat() {
  startNew();
  closeMenu();
  $("text").focus();
}

async function importFile(file) {
  try {
    const { chats, changed } = addImported([...state.chats.values()], fromFile(await file.text()));
    state.chats = new Map(chats.map((c) => [c.id, c]));
    for (const conversation of changed) await keep(conversation);
    show(changed[0].id);
    notice(`${changed.length} conversation${changed.length > 1 ? "s" : ""} imported from ${file.name}.`);
  } catch (error) { notice(`${file.name}: ${error.message}`, "", () => {}, 0); }
  emit("list");
}

// The words of a conversation, in all its versions.
const words = (c) => [c.title, ...Object.values(c.messages).map(textOf)].join("\n").toLowerCase();

function drawList() {
  const wanted = $("search").value.trim().toLowerCase(), list = $("list"), focused = document.activeElement?.dataset?.id;
  const found = listed().filter((c) => !wanted || words(c).includes(wanted));
  const groups = new Map();
  for (const c of found) {
    const day = dayOf(c.changed);
    if (!groups.has(day)) groups.set(day, []);
    groups.get(day).push(item(c));
  }
  list.replaceChildren(...[...groups].flatMap(([day, items]) => [make("li", { className: "day" }, day), ...items]));
  if (!found.length) list.append(make("li", { className: "day" }, wanted ? "Nothing found." : "No conversations yet."));
  if (focused) list.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
}

export function dayOf(time, now = Date.now()) {
  const start = (t) => new Date(t).setHours(0, 0, 0, 0), days = Math.round((start(now) - start(time)) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days < 7) return new Date(time).toLocaleDateString(undefined, { weekday: "long" });
  return new Date(time).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

function item(c) {
  const shown = c.id === state.current, title = withoutOverrides(c.title || "New conversation");
  const open = button(title, () => { show(c.id); closeMenu(); }, { className: "open", "data-id": c.id, dir: "auto", title: `${title}\n${new Date(c.changed).toLocaleString()}` });
  if (shown) open.setAttribute("aria-current", "true");
  if (answers.isRunning(c)) open.append(make("span", { className: "busy", role: "img", "aria-label": "being answered" }));
  if (state.unsaved.has(c.id)) open.append(make("span", { className: "unsaved" }, "not kept"));
  const menu = make("details", { className: "menu-of" }, make("summary", { "aria-label": `More for ${title}` }, "⋯"),
    make("div", { className: "choices" },
      button("Rename", () => rename(c)),
      button("Export as Markdown", () => download(fileName(c, "md"), toMarkdown(c), "text/markdown")),
      button("Export as JSON", () => download(fileName(c, "json"), toJson([c]), "application/json")),
      button("Delete", () => { remove(c, answers.stop); announce("Deleted"); })));
  return make("li", { className: shown ? "shown" : "" }, open, menu);
}

function rename(c) {
  const li = $("list").querySelector(`[data-id="${CSS.escape(c.id)}"]`).closest("li");
  const field = make("input", { value: c.title, maxLength: 200, "aria-label": "Title" });
  let open = true;
  const finish = (take) => {
    if (!open) return;
    open = false;
    if (take && field.value.trim()) { c.title = field.value.trim(); c.changed = Date.now(); keep(c); }
    drawList();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") { event.stopPropagation(); finish(false); }
  });
  field.addEventListener("blur", () => finish(true));
  li.replaceChildren(field);
  field.select();
}

// ---- on small screens the list is a drawer -----------------------------------------------------------------------

export function closeMenu() {
  if (!document.body.classList.contains("open")) return false;
  document.body.classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
  return true;
}

export function toggleMenu() {
  const open = document.body.classList.toggle("open");
  $("menu").setAttribute("aria-expanded", String(open));
  if (open) $("new").focus();
}

