// What the page knows: conversations, settings, the server's models. Whoever changes something emits an event.

import { notice } from "./dom.js";
import * as storage from "./storage.js";
import { newConversation } from "./tree.js";

export const DEFAULTS = { system: "", temperature: "", top_k: "", top_p: "", min_p: "", max_tokens: "", seed: "", probabilities: false, key: "", model: "", theme: "" };

export const state = {
  chats: new Map(),  // id -> conversation, with `deleted` while that can be undone
  current: null,  // id of the conversation shown
  settings: { ...DEFAULTS },
  models: null,  // of the server; null: not reached
  stored: true,  // whether this browser keeps what is written
  unsaved: new Set(),  // ids of conversations for which there was no room
};

// Events: "list" the conversations, "current" which one is shown, "message" (conversation, message) one of them changed,
// "running" answers begin or end, "settings", "models".
const listeners = {};
export const on = (name, run) => { (listeners[name] ??= []).push(run); };
export const emit = (name, ...values) => { for (const run of listeners[name] || []) run(...values); };

export const current = () => state.chats.get(state.current) ?? null;
export const model = () => state.models?.find((m) => m.id === state.settings.model) ?? state.models?.[0] ?? null;

// Conversations to list, newest first.
export const listed = () => [...state.chats.values()].filter((c) => !c.deleted && Object.keys(c.messages).length)
  .sort((a, b) => b.changed - a.changed);

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

let fullNotice = null;
// Store a conversation. Where there is no room, say so until there is: nothing goes on as if it were saved.
export async function keep(conversation) {
  if (!state.stored) return;
  try {
    await storage.save(conversation);
    state.unsaved.delete(conversation.id);
    if (!state.unsaved.size) { fullNotice?.(); fullNotice = null; }
  } catch (error) {
    state.unsaved.add(conversation.id);
    const why = error?.name === "QuotaExceededError" ? "This browser has no room left" : `This browser could not store it (${error?.name || "error"})`;
    fullNotice ??= notice(`${why}: what was written last is NOT kept when the page is closed. Export it, or delete conversations.`,
      "Try again", () => { fullNotice = null; for (const id of state.unsaved) keep(state.chats.get(id)); }, 0);
  }
  emit("list");
}

// Delete, with a chance to undo it; until that is over the conversation is only hidden.
export function remove(conversation, stop) {
  conversation.deleted = conversation.changed = Date.now();
  stop(conversation);
  keep(conversation);
  const forever = () => {
    if (!conversation.deleted) return;
    state.chats.delete(conversation.id);
    storage.forget(conversation.id);
  };
  const back = () => {
    delete conversation.deleted;
    conversation.changed = Date.now();
    keep({ ...conversation, deleted: undefined });
    show(conversation.id);
    emit("list");
  };
  notice(`Deleted “${conversation.title || "conversation"}”.`, "Undo", back, 15, forever);
  if (state.current === conversation.id) show(listed()[0]?.id ?? null);
  emit("list");
}

const ABANDONED = 24 * 3600 * 1000;  // a deleted conversation whose tab was closed meanwhile

// Load everything; returns once the page can be drawn.
export async function load() {
  state.stored = await storage.open();
  state.settings = { ...DEFAULTS, ...storage.loadSettings() };
  if (!state.stored) notice("This browser keeps nothing (a private window?): conversations are lost when the page is closed.", "", () => {}, 0);
  const { chats, damaged } = state.stored ? await storage.loadAll() : { chats: [], damaged: 0 };
  if (damaged) notice(`${damaged} stored conversation${damaged > 1 ? "s" : ""} could not be read; the others are here.`, "", () => {}, 0);
  for (const chat of chats) {
    if (chat.deleted && Date.now() - chat.deleted > ABANDONED) storage.forget(chat.id);
    else state.chats.set(chat.id, chat);
  }
  let last = "";
  try { last = sessionStorage.getItem("nanochat/current"); } catch { /* as above */ }
  const shown = state.chats.get(last);
  state.current = shown && !shown.deleted ? last : last === null ? listed()[0]?.id ?? null : null;
  storage.listen(changedElsewhere, () => {
    state.settings = { ...state.settings, ...storage.loadSettings() };
    emit("settings");
  });
}

async function changedElsewhere(id) {
  const stored = await storage.loadOne(id), own = state.chats.get(id);
  if (!stored) state.chats.delete(id);
  else if (own) {  // the same object: answers being written here refer to it
    const written = new Set(Object.values(own.messages).filter((m) => m.writing).map((m) => m.id));
    for (const message of Object.values(stored.messages)) {
      if (!written.has(message.id)) own.messages[message.id] = { ...message };
    }
    Object.assign(own, { title: stored.title, changed: stored.changed, deleted: stored.deleted });
  } else state.chats.set(id, stored);
  if (id === state.current) {
    if (!stored || stored.deleted) show(listed()[0]?.id ?? null); else emit("elsewhere");
  }
  emit("list");
}

export function changeSettings(changes) {
  Object.assign(state.settings, changes);
  if (!storage.saveSettings(state.settings)) notice("This browser did not store the settings; they hold until the page is closed.");
  emit("settings");
}
