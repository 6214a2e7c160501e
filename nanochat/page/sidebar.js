// The list of conversations: search, rename, export, delete, restore.

import * as answers from "./answers.js";
import { $, announce, button, download, make, notice, withoutOverrides } from "./dom.js";
import { showFound } from "./messages.js";
import { DELETED_DAYS, emit, erase, keep, listed, on, remove, restore, show, startNew, state } from "./state.js";
import { addImported, fileName, fromFile, MAX_BYTES, toJson, toMarkdown } from "./transfer.js";
import { lastUsed, reveal, touch } from "./tree.js";

const drawn = new Map();  // conversation id -> {node, from: what it was drawn from}
let renaming = null;  // the conversation whose title is being edited

export function setUpSidebar() {
  for (const event of ["list", "current", "running"]) on(event, drawList);
  $("search").addEventListener("input", drawList);
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing && event.target.value.trim()) $("list").querySelector("button.open")?.click();
    if (event.key !== "Escape" || event.isComposing || !event.target.value) return;
    event.stopPropagation();  // it would stop an answer
    event.target.value = "";
    drawList();
  });
  for (const id of ["new", "new-here"]) $(id).addEventListener("click", newChat);
  $("menu").addEventListener("click", () => document.body.classList.contains("open") ? closeMenu() : openMenu());
  $("behind").addEventListener("click", closeMenu);
  $("export-all").addEventListener("click", () => download("nanochat-conversations.json", toJson(listed()), "application/json"));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    for (const file of [...$("import-file").files]) await importFile(file);
    $("import-file").value = "";
  });
}

export function newChat() {
  startNew();
  closeMenu();
  $("text").focus();
}

const counted = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

async function importFile(file) {
  try {
    if (file.size > MAX_BYTES) throw new Error(`it is larger than ${MAX_BYTES / 2 ** 20} MB.`);
    const { conversations, left } = fromFile(await file.text());
    const changed = addImported(state.chats, conversations), known = conversations.length - changed.length;
    for (const conversation of changed) await keep(conversation);
    if (changed.length) show(changed[0].id);
    const rest = [known ? `${counted(known, "conversation")} in it ${known === 1 ? "was" : "were"} here already` : "", left ? `${counted(left, "entry").replace("entrys", "entries")} could not be read` : ""];
    notice([`${counted(changed.length, "conversation")} imported from ${file.name}`, ...rest.filter(Boolean)].join("; ") + ".");
  } catch (error) { notice(`${file.name}: ${error.message}`, "", () => {}, 0); }
  emit("list");
}

// ---- the list ---------------------------------------------------------------------------------------------------

// Where the words stand in a conversation, in any version: {message, text: what is around them}, or null.
function find(c, words) {
  const inTitle = c.title.toLowerCase().includes(words);
  for (const message of Object.values(c.messages).sort((a, b) => a.made - b.made)) {
    const text = message.role === "user" ? message.text : message.parts.map((part) => part.text).join("\n");
    const at = text.toLowerCase().indexOf(words);
    if (at >= 0) return { message, text: inTitle ? null : [text.slice(Math.max(0, at - 20), at), text.slice(at, at + words.length), text.slice(at + words.length, at + words.length + 60)] };
  }
  return inTitle ? {} : null;
}

function drawList() {
  const words = $("search").value.trim().toLowerCase(), days = new Map();
  for (const c of listed()) {
    const found = words ? find(c, words) : {};
    if (!found) continue;
    const day = dayOf(lastUsed(c));
    if (!days.has(day)) days.set(day, []);
    days.get(day).push(item(c, found, words));
  }
  const wanted = [...days].flatMap(([day, items]) => [make("li", { className: "day" }, day), ...items]);
  if (!wanted.length) wanted.push(make("li", { className: "day" }, words ? "Nothing found." : "No conversations yet."));
  const list = $("list"), deleted = listed(true);
  if (deleted.length && !words) wanted.push(deletedItem(deleted));
  const staying = new Set(wanted);
  for (const node of [...list.children]) if (!staying.has(node)) node.remove();  // first, so that those that stay need not move
  for (const [i, node] of wanted.entries()) if (list.children[i] !== node) list.insertBefore(node, list.children[i] ?? null);
  for (const id of drawn.keys()) if (!state.chats.has(id)) drawn.delete(id);
}

export function dayOf(time, now = Date.now()) {
  const start = (t) => new Date(t).setHours(0, 0, 0, 0), days = Math.round((start(now) - start(time)) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days < 7) return new Date(time).toLocaleDateString(undefined, { weekday: "long" });
  return new Date(time).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

// A conversation's entry; the same node as long as nothing of it changes, so that focus stays and a title can be edited.
function item(c, found, words) {
  const shown = c.id === state.current, busy = answers.isRunning(c), unsaved = state.unsaved.has(c.id), text = found.text ?? null;
  const from = JSON.stringify([c.title, lastUsed(c), shown, busy, unsaved, text, found.message?.id, words, renaming === c]), old = drawn.get(c.id);
  if (old && (old.from === from || renaming === c && old.renaming)) return old.node;
  const node = old?.node ?? make("li"), hadFocus = node.contains(document.activeElement) && document.activeElement.className;
  node.className = shown ? "shown" : "";
  node.replaceChildren(...(renaming === c ? [titleField(c)] : entry(c, found, words, { shown, busy, unsaved })));
  if (hadFocus) node.querySelector("." + hadFocus)?.focus();
  drawn.set(c.id, { node, from, renaming: renaming === c });
  return node;
}

function entry(c, found, words, { shown, busy, unsaved }) {
  const title = withoutOverrides(c.title || "New conversation"), time = new Date(lastUsed(c)).toLocaleString();
  const go = () => {
    if (found.message) reveal(c, found.message);
    show(c.id);
    closeMenu();
    if (found.message) showFound(found.message, words);
  };
  const open = button("", go, { className: "open", "data-id": c.id, title: `${title}\n${time}` });
  open.append(make("span", { className: "title", dir: "auto" }, title));
  if (shown) open.setAttribute("aria-current", "true");
  if (busy) open.append(make("span", { className: "busy", role: "img", "aria-label": "being answered" }));
  if (unsaved) open.append(make("span", { className: "unsaved" }, "not kept"));
  if (found.text) open.append(make("span", { className: "found", dir: "auto" }, found.text[0], make("mark", {}, found.text[1]), found.text[2]));
  const more = button("…", () => openChoices(c, more), { className: "more", "aria-label": `More for ${title}`, "aria-haspopup": "true" });
  return [open, more];
}

function openChoices(c, opener) {
  const box = $("choices"), choose = (text, run) => button(text, () => { box.hidePopover(); run(); });
  box.replaceChildren(
    choose("Rename", () => { renaming = c; drawList(); $("list").querySelector("input").select(); }),
    choose("Export as Markdown", () => download(fileName(c, "md"), toMarkdown(c), "text/markdown")),
    choose("Export as JSON", () => download(fileName(c, "json"), toJson([c]), "application/json")),
    choose("Delete", () => { answers.stop(c); remove(c); announce("Deleted"); $("new").focus(); }));
  box.ontoggle = (event) => {  // where its opener was drawn again meanwhile
    if (event.newState === "closed" && (document.activeElement === document.body || box.contains(document.activeElement))) drawn.get(c.id)?.node.querySelector(".more")?.focus();
  };
  box.showPopover();
  const at = opener.getBoundingClientRect();
  box.style.left = Math.max(8, Math.min(at.right - box.offsetWidth, innerWidth - box.offsetWidth - 8)) + "px";
  box.style.top = Math.max(8, Math.min(at.bottom + 4, innerHeight - box.offsetHeight - 8)) + "px";
  box.firstChild.focus();
}

function titleField(c) {
  const field = make("input", { value: c.title, maxLength: 200, "aria-label": "Title" });
  const finish = (take) => {
    if (renaming !== c) return;
    renaming = null;
    if (take && field.value.trim()) { c.title = field.value.trim(); touch(c); keep(c); }
    drawList();
    if (document.activeElement === document.body) drawn.get(c.id)?.node.querySelector(".open")?.focus();  // the field had it
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) { event.preventDefault(); finish(true); }  // else it would open the conversation
    if (event.key === "Escape") { event.stopPropagation(); finish(false); }
  });
  field.addEventListener("blur", () => setTimeout(() => { if (document.activeElement !== field) finish(true); }));
  return field;
}

let deletedDrawn = null;  // {node, from: what it was drawn from}

// The list of deleted conversations; the same node as long as nothing of it changes.
function deletedItem(chats) {
  const from = JSON.stringify(chats.map((c) => [c.id, c.title]));
  if (deletedDrawn?.from === from) return deletedDrawn.node;
  const details = make("details", { open: deletedDrawn?.node.firstChild.open ?? false }, make("summary", {}, `Deleted (${chats.length})`),
    make("p", { className: "quiet" }, `Kept for ${DELETED_DAYS} days, unless room is needed.`));
  for (const { id, title: named } of chats) {
    const title = withoutOverrides(named || "New conversation"), chat = () => state.chats.get(id);
    details.append(make("div", { className: "row" }, make("span", { className: "title", dir: "auto" }, title),
      button("Restore", () => restore(chat()), { "aria-label": `Restore ${title}` }),
      button("Delete for good", () => { answers.stop(chat()); erase(chat()); }, { "aria-label": `Delete ${title} for good` })));
  }
  deletedDrawn = { node: make("li", { className: "deleted" }, details), from };
  return deletedDrawn.node;
}

// ---- on small screens the list is a drawer -----------------------------------------------------------------------

export function openMenu() {
  if (!$("menu").offsetWidth) return;  // on a wide screen the list is always there
  document.body.classList.add("open");
  $("menu").setAttribute("aria-expanded", "true");
  $("new").focus();
}

export function closeMenu() {
  if (!document.body.classList.contains("open")) return false;
  document.body.classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
  if (document.activeElement?.closest("nav")) $("menu").focus();
  return true;
}
