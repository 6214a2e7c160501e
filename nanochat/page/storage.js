// Conversations and drafts in the browser's IndexedDB, settings in its localStorage. Each message is an entry of its own,
// so that what is written while an answer grows is small, and several tabs can add to one conversation.

import { checked, fromList } from "./checked.js";

const channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("nanochat") : null;
const saved = new Map();  // message id -> its `changed` when this tab stored it last
let database = null, waiting = () => {};

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

// The open database, opened again where the browser closed it. Rejects where it keeps nothing (blocked storage), and with
// VersionError where a newer version of this page has changed it.
async function connect() {
  if (database) return database;
  const request = indexedDB.open("nanochat", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("chats", { keyPath: "id" });
    request.result.createObjectStore("messages", { keyPath: ["chat", "id"] });
    request.result.createObjectStore("drafts");
  };
  request.onblocked = () => waiting();
  const opened = database = await done(request);
  const close = () => { opened.close(); saved.clear(); if (database === opened) database = null; };
  opened.onversionchange = opened.onclose = close;  // so that a newer page in another tab need not wait
  return database;
}

// Open the database; `blocked` is called where another tab, with an older page, must be closed first.
export async function open(blocked) {
  waiting = blocked;
  await connect();
}

// Run `use(...stores)`, which requests all it wants at once; resolves to what its requests gave, once it is stored. The
// transaction is committed at once, so that it completes even if the page is being closed.
async function inStores(names, mode, use) {
  const transaction = (await connect()).transaction(names, mode);
  return new Promise((resolve, reject) => {
    let requests = [];
    transaction.oncomplete = () => resolve(requests.map((request) => request.result));
    transaction.onerror = transaction.onabort = () => reject(transaction.error || new DOMException("aborted", "AbortError"));
    try { requests = use(...names.map((name) => transaction.objectStore(name))); transaction.commit(); }
    catch (error) { reject(error); transaction.abort(); }
  });
}

const messagesOf = (id) => IDBKeyRange.bound([id], [id, []]);
const together = (chat, messages) => checked(chat && { ...chat, messages: Object.fromEntries(messages.map((m) => [m?.id, m])) });

// All readable conversations, as {chats, damaged}: how many could not be read.
export async function loadAll() {
  const [all, messages] = await inStores(["chats", "messages"], "readonly", (chats, texts) => [chats.getAll(), texts.getAll()]);
  const byChat = new Map(all.map((chat) => [chat.id, []]));
  for (const m of messages) byChat.get(m.chat)?.push(m);
  const chats = all.map((chat) => together(chat, byChat.get(chat.id))).filter(Boolean);
  return { chats, damaged: all.length - chats.length };
}

export async function loadOne(id) {
  const [chat, messages] = await inStores(["chats", "messages"], "readonly", (chats, texts) => [chats.get(id), texts.getAll(messagesOf(id))]);
  return together(chat, messages);
}

// Store what has changed of a conversation, and say so to the other tabs. Rejects where there is no room
// (QuotaExceededError).
export async function save(conversation) {
  const { messages, ...rest } = conversation, changed = Object.values(messages).filter((m) => saved.get(m.id) !== m.changed).map((m) => ({ ...m, chat: rest.id }));
  await inStores(["chats", "messages"], "readwrite", (chats, texts) => [chats.put(rest), ...changed.map((m) => texts.put(m))]);
  for (const m of changed) saved.set(m.id, m.changed);
  channel?.postMessage({ id: rest.id });
}

export async function forget(id) {
  await inStores(["chats", "messages", "drafts"], "readwrite", (chats, texts, drafts) => [chats.delete(id), texts.delete(messagesOf(id)), drafts.delete(id)]);
  saved.clear();
  channel?.postMessage({ id, forgotten: true });
}

// ---- drafts: texts not sent yet ---------------------------------------------------------------------------------

export const saveDraft = (id, text) => inStores(["drafts"], "readwrite", (drafts) => [text === null ? drafts.delete(id) : drafts.put(text, id)]);

export async function loadDrafts() {
  const [ids, texts] = await inStores(["drafts"], "readonly", (drafts) => [drafts.getAllKeys(), drafts.getAll()]);
  return new Map(ids.map((id, i) => [id, texts[i]]).filter(([, text]) => typeof text === "string"));
}

// Call `changed(id)` when another tab stored or forgot a conversation, `settings()` when it changed the settings.
export function listen(changed, settings) {
  if (channel) channel.onmessage = ({ data }) => {
    if (data.forgotten) saved.clear();  // if it is restored here, all of it is to be stored again
    changed(data.id);
  };
  addEventListener("storage", ({ key }) => { if (key === SETTINGS) settings(); });
}

// ---- settings -----------------------------------------------------------------------------------------------

const SETTINGS = "nanochat/settings";
const parsed = (text) => { try { return JSON.parse(text); } catch { return null; } };

// The stored settings of those in `defaults`, where they are of the same kind.
export function loadSettings(defaults) {
  let kept = null;
  try { kept = parsed(localStorage.getItem(SETTINGS)); } catch { /* storage is blocked */ }
  return Object.fromEntries(Object.entries(defaults).map(([name, value]) => [name, typeof kept?.[name] === typeof value ? kept[name] : value]));
}

export function saveSettings(settings) {
  try { localStorage.setItem(SETTINGS, JSON.stringify(settings)); return true; } catch { return false; }
}

// ---- what earlier versions of the page kept in localStorage ---------------------------------------------------

const FORMER = "nanochat";

// [{key, chats}]: the entries, with the conversations that must be stored before one is removed.
export function loadFormer() {
  const kept = parsed(localStorage.getItem(FORMER)), entries = [];
  if (kept?.settings) saveSettings({ ...kept.settings, theme: kept.theme, ...parsed(localStorage.getItem(SETTINGS)) });
  if (kept) entries.push({ key: FORMER, old: Array.isArray(kept.chats) ? kept.chats : [] });
  for (const key of Object.keys(localStorage)) {
    if (key.startsWith(FORMER + "/") && key !== SETTINGS) entries.push({ key, old: [parsed(localStorage.getItem(key))] });
  }
  return entries.map(({ key, old }) => ({ key, chats: old.map(formerChat) })).filter(({ chats }) => chats.every(Boolean));
}

function formerChat(old, number) {
  if (!Array.isArray(old?.messages)) return null;
  const made = Number(old.made) > 1e12 ? Number(old.made) : Date.now() - number;
  return fromList(old.messages, String(old.title ?? ""), old.id ? String(old.id) : undefined, made);
}

export const forgetFormer = (key) => localStorage.removeItem(key);
