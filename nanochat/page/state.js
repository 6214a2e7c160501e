// What the page knows: conversations, drafts, settings, the server's models. What changes something emits an event.

import { notice } from "./dom.js";
import * as storage from "./storage.js";
import { lastUsed, merge, newConversation, touch } from "./tree.js";

export const DEFAULTS = { system: "", temperature: "", top_k: "", top_p: "", min_p: "", max_tokens: "", seed: "", probabilities: false, key: "", model: "", theme: "" };

export const state = {
  chats: new Map(),  // id -> conversation, with the time `deleted` where it can be restored
  current: null,  // id of the conversation shown
  drafts: new Map(),  // id of a conversation, or "edit/" and that of a message -> text that was not sent
  settings: { ...DEFAULTS },
  models: null,  // of the server when it was last reached; null: never
  stored: true,  // whether this browser keeps what is written
  unsaved: new Set(),  // ids of conversations that could not be stored
};

// Events: "list" the conversations, "current" which one is shown, "message" (conversation, message) one of them changed,
// "draw" it again, "running" answers begin or end, "elsewhere" (conversation) another tab stored it, "settings", "models".
const listeners = {};
export const on = (name, run) => { (listeners[name] ??= []).push(run); };
export const emit = (name, ...values) => { for (const run of listeners[name] || []) run(...values); };

export const current = () => state.chats.get(state.current) ?? null;
export const model = () => state.models?.find((m) => m.id === state.settings.model) ?? state.models?.[0] ?? null;

// Conversations to list, those used last first; or the deleted ones.
export const listed = (deleted = false) => [...state.chats.values()].filter((c) => Boolean(c.deleted) === deleted && Object.keys(c.messages).length)
  .map((c) => [c, deleted ? c.deleted : lastUsed(c)]).sort((a, b) => b[1] - a[1]).map(([c]) => c);

export function show(id) {
  state.current = id;
  try { sessionStorage.setItem("nanochat/current", id ?? ""); } catch { /* the tab begins with the newest next time */ }
  emit("current");
}

export function startNew() {
  const made = newConversation();
  state.chats.set(made.id, made);
  show(made.id);
  return made;
}

// ---- storing ------------------------------------------------------------------------------------------------

let failing = null;  // closes the notice that something could not be stored
const unsavedDrafts = new Set();

// Say that something was not stored, until it is: nothing goes on as if it were.
function failed(error) {
  if (failing) return;
  const full = error?.name === "QuotaExceededError", outdated = error?.name === "VersionError";
  const why = full ? "This browser has no room left" : outdated ? "A newer version of this page was opened in another tab" : `This browser could not store it (${error?.name || "error"})`;
  const advice = full ? " Delete conversations, or export this one." : "";
  failing = notice(`${why}: what was written last is NOT kept when the page is closed.${advice}`, outdated ? "Reload" : "Try again", outdated ? () => location.reload() : again, 0);
}

function again() {
  failing = null;
  for (const id of state.unsaved) keep(state.chats.get(id));
  for (const id of unsavedDrafts) keepDraft(id, state.drafts.get(id) ?? null);
}

function succeeded() {
  if (state.unsaved.size || unsavedDrafts.size) return;
  failing?.();
  failing = null;
}

// Store a conversation; returns whether that was possible. What was deleted earlier makes room if there is too little.
export async function keep(conversation) {
  if (!state.stored || state.chats.get(conversation.id) !== conversation) return false;
  try {
    try { await storage.save(conversation); }
    catch (error) {
      const deleted = listed(true);
      if (error?.name !== "QuotaExceededError" || !deleted.length) throw error;
      for (const other of deleted) await storage.forget(other.id);
      if (!conversation.deleted) await storage.save(conversation);
    }
    state.unsaved.delete(conversation.id);
    succeeded();
  } catch (error) {
    state.unsaved.add(conversation.id);
    failed(error);
  }
  emit("list");
  return !state.unsaved.has(conversation.id);
}

// Keep a text that is not sent yet, here and in the browser; null: there is none.
export async function keepDraft(id, text) {
  if (text === null) state.drafts.delete(id); else state.drafts.set(id, text);
  if (!state.stored) return;
  try { await storage.saveDraft(id, text); unsavedDrafts.delete(id); succeeded(); }
  catch (error) { unsavedDrafts.add(id); failed(error); }
}

export function changeSettings(changes) {
  Object.assign(state.settings, changes);
  if (!storage.saveSettings(state.settings)) notice("This browser did not store the settings; they hold until the page is closed.");
  emit("settings");
}

// ---- deleting -----------------------------------------------------------------------------------------------

export const DELETED_DAYS = 30;  // for which a deleted conversation can be restored

export function remove(conversation) {
  if (conversation.deleted) return;  // a second click
  conversation.deleted = Date.now();
  touch(conversation);
  keep(conversation);
  notice(`Deleted “${conversation.title || "conversation"}”.`, "Undo", () => restore(conversation), 15);
  if (state.current === conversation.id) show(listed()[0]?.id ?? null);
  emit("list");
}

export function restore(conversation) {
  conversation.deleted = 0;
  touch(conversation);
  state.chats.set(conversation.id, conversation);
  keep(conversation);
  show(conversation.id);
  emit("list");
}

// Delete for good.
export function erase(conversation) {
  state.chats.delete(conversation.id);
  state.unsaved.delete(conversation.id);
  for (const id of Object.keys(conversation.messages)) if (state.drafts.has("edit/" + id)) keepDraft("edit/" + id, null);
  if (state.stored) storage.forget(conversation.id).catch(failed);
  emit("list");
}

// ---- loading ------------------------------------------------------------------------------------------------

const permanent = (text, action = "", run = () => {}) => notice(text, action, run, 0);

// Load everything; returns once the page can be drawn.
export async function load() {
  try {
    await storage.open(() => permanent("Another tab has an older version of this page open; close it to go on."));
    await loadStored();
  } catch (error) {
    state.stored = false;
    permanent(error?.name === "VersionError" ? "The conversations in this browser were stored by a newer version of this page. They are safe, but nothing written here is kept."
      : "This browser keeps nothing (its storage is blocked, or this is a private window): conversations are lost when the page is closed.");
  }
  state.settings = storage.loadSettings(DEFAULTS);
  let last = "";
  try { last = sessionStorage.getItem("nanochat/current"); } catch { /* as above */ }
  const shown = state.chats.get(last);
  state.current = shown && !shown.deleted ? last : last === null ? listed()[0]?.id ?? null : null;
  storage.listen((id) => changedElsewhere(id), () => {
    state.settings = storage.loadSettings(DEFAULTS);
    emit("settings");
  });
}

async function loadStored() {
  const { chats, damaged } = await storage.loadAll();
  if (damaged) permanent(`${damaged} stored conversation${damaged > 1 ? "s" : ""} could not be read; the others are here.`);
  for (const chat of chats) state.chats.set(chat.id, chat);
  for (const chat of listed(true)) if (Date.now() - chat.deleted > DELETED_DAYS * 86_400_000) erase(chat);
  state.drafts = await storage.loadDrafts();
  for (const { key, chats: former } of storage.loadFormer()) {
    for (const chat of former) state.chats.set(chat.id, merge(state.chats.get(chat.id), chat));
    const kept = await Promise.all(former.filter((c) => Object.keys(c.messages).length).map((c) => keep(state.chats.get(c.id))));
    if (kept.every(Boolean)) storage.forgetFormer(key);
  }
}

async function changedElsewhere(id) {
  const stored = await storage.loadOne(id), own = state.chats.get(id);
  if (!stored) state.chats.delete(id);
  else if (!own) state.chats.set(id, stored);
  else {  // the same object, and the same messages where they are as new: answers being written refer to them
    for (const message of Object.values(stored.messages)) {
      if (!(own.messages[message.id]?.changed >= message.changed)) own.messages[message.id] = message;
    }
    if (stored.changed > own.changed) Object.assign(own, { title: stored.title, changed: stored.changed, deleted: stored.deleted });
  }
  emit("elsewhere", state.chats.get(id) ?? own);
  if (id === state.current && (!stored || stored.deleted)) show(listed()[0]?.id ?? null);
  emit("list");
}
