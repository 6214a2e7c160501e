// Conversations and drafts in the browser's IndexedDB, settings in its localStorage. Several tabs may write at once:
// what is stored of a conversation is merged with what this tab has (tree.merge), and the other tabs hear of it.

import { checked, fromList, merge } from "./tree.js";

const channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("nanochat") : null;
let database = null;

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

// Open the database; false where the browser keeps nothing (private windows, blocked storage).
export async function open() {
  try {
    const request = indexedDB.open("nanochat", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats", { keyPath: "id" });
      request.result.createObjectStore("drafts");
    };
    database = await done(request);
    database.onversionchange = () => database.close();
    await importFormer();
    return true;
  } catch { database = null; return false; }
}

function inStore(name, mode, use) {
  if (!database) return Promise.resolve(null);
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(name, mode);
    let result;
    transaction.oncomplete = () => resolve(result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error || new DOMException("aborted", "AbortError"));
    const fail = (error) => { reject(error); transaction.abort(); };
    use(transaction.objectStore(name), (value) => { result = value; }, fail);
  });
}

// All readable conversations, as {chats, damaged}: how many could not be read.
export async function loadAll() {
  let all = [];
  await inStore("chats", "readonly", (store) => { store.getAll().onsuccess = (event) => { all = event.target.result; }; });
  const chats = all.map(checked).filter(Boolean);
  return { chats, damaged: all.length - chats.length };
}

export async function loadOne(id) {
  return inStore("chats", "readonly", (store, give) => { store.get(id).onsuccess = (event) => give(checked(event.target.result)); });
}

// Merge into what is stored, and say so to the other tabs. Rejects where there is no room (QuotaExceededError).
export async function save(conversation) {
  const merged = await inStore("chats", "readwrite", (store, give, fail) => {
    store.get(conversation.id).onsuccess = (event) => {
      const value = structuredClone(merge(checked(event.target.result), conversation));
      try { store.put(value); } catch (error) { fail(error); }
      give(value);
    };
  });
  channel?.postMessage({ id: conversation.id });
  return merged ?? conversation;
}

export async function forget(id) {
  await inStore("chats", "readwrite", (store) => store.delete(id));
  await inStore("drafts", "readwrite", (store) => store.delete(id));
  channel?.postMessage({ id });
}

export const saveDraft = (id, text) => inStore("drafts", "readwrite", (store) => text ? store.put(text, id) : store.delete(id));

export const loadDraft = (id) => inStore("drafts", "readonly", (store, give) => { store.get(id).onsuccess = (event) => give(event.target.result ?? ""); });

// Call `changed(id)` when another tab stored a conversation, `settings()` when it changed the settings.
export function listen(changed, settings) {
  if (channel) channel.onmessage = ({ data }) => changed(data.id);
  addEventListener("storage", ({ key }) => { if (key === SETTINGS) settings(); });
}

// ---- settings -----------------------------------------------------------------------------------------------

const SETTINGS = "nanochat/settings";
const parsed = (text) => { try { return JSON.parse(text); } catch { return null; } };

export function loadSettings() {
  try { return parsed(localStorage.getItem(SETTINGS)) || {}; } catch { return {}; }
}

export function saveSettings(settings) {
  try { localStorage.setItem(SETTINGS, JSON.stringify(settings)); return true; } catch { return false; }
}

// ---- what earlier versions of the page kept in localStorage ---------------------------------------------------

async function importFormer() {
  const FORMER = "nanochat", CHAT = "nanochat/";
  const kept = parsed(localStorage.getItem(FORMER));
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(CHAT) && key !== SETTINGS);
  const old = [...(Array.isArray(kept?.chats) ? kept.chats : []), ...keys.map((key) => parsed(localStorage.getItem(key)))];
  for (const [number, chat] of old.filter((c) => Array.isArray(c?.messages)).entries()) {
    const made = Number(chat.made) || Date.now() - number;
    await save({ ...fromList(chat.messages, String(chat.title ?? ""), made), id: String(chat.id), changed: made });
  }
  if (kept?.settings) saveSettings({ ...kept.settings, theme: kept.theme, ...loadSettings() });
  for (const key of [FORMER, ...keys]) localStorage.removeItem(key);  // only once all of them are stored
}
