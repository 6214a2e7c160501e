// A conversation is a tree of messages: editing a question or asking again adds a branch beside the old one, and a path
// leads through it, by the child chosen at each message. All functions here are pure but for the conversation they are
// given. A message:
//   id, parent (null for the first), role "user" | "assistant", made, changed (ms)
//   user:       text
//   assistant:  parts [{kind: "text" | "python" | "python_output", text}], tokens (tokens.js) or undefined,
//               end: undefined while it is written, then "stop" | "length" | "stopped" | "error"
//               error {text, action}, usage {tokens, seconds}, dropped: earlier messages the server left out,
//               from: how many of its first tokens were given (a branch, or what was continued), model

export const newId = () => crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}`;

export function newConversation() {
  const now = Date.now();
  return { id: newId(), made: now, changed: now, title: "", messages: {}, chosen: {} };
}

const ROOT = "";  // stands for "no parent" in `chosen`

// The messages that continue `parent` (null: the conversation's first messages), oldest first.
export function children(conversation, parent) {
  return Object.values(conversation.messages).filter((m) => m.parent === parent)
    .sort((a, b) => a.made - b.made || (a.id < b.id ? -1 : 1));
}

// The messages from the first to the last along the chosen versions.
export function path(conversation) {
  const byParent = new Map();
  for (const m of Object.values(conversation.messages)) {
    if (!byParent.has(m.parent)) byParent.set(m.parent, []);
    byParent.get(m.parent).push(m);
  }
  const found = [], seen = new Set();
  for (let parent = null; byParent.has(parent) && !seen.has(parent);) {
    seen.add(parent);
    const versions = byParent.get(parent).sort((a, b) => a.made - b.made || (a.id < b.id ? -1 : 1));
    const wanted = conversation.chosen[parent ?? ROOT];
    const next = versions.find((m) => m.id === wanted) || versions.at(-1);
    found.push(next);
    parent = next.id;
  }
  return found;
}

// Which version a message is: [its number from 1, how many there are].
export function version(conversation, message) {
  const versions = children(conversation, message.parent);
  return [versions.indexOf(message) + 1, versions.length];
}

// Show the version `step` places from this one.
export function chooseVersion(conversation, message, step) {
  const versions = children(conversation, message.parent);
  const next = versions[versions.indexOf(message) + step];
  if (next) choose(conversation, next);
  return next;
}

export function choose(conversation, message) {
  conversation.chosen[message.parent ?? ROOT] = message.id;
  conversation.changed = Date.now();
}

// Add a message after `parent` and choose it.
export function add(conversation, parent, message) {
  const siblings = children(conversation, parent);
  const made = Math.max(Date.now(), (siblings.at(-1)?.made ?? 0) + 1);  // so that it is the newest version
  const added = { id: newId(), parent, made, changed: made, ...message };
  conversation.messages[added.id] = added;
  choose(conversation, added);
  if (!conversation.title && added.role === "user") conversation.title = titleOf(added.text);
  return added;
}

export const titleOf = (text) => text.trim().replace(/\s+/g, " ").slice(0, 80);

// The text of a message, without its tool calls.
export const textOf = (message) => message.role === "user" ? message.text
  : message.parts.filter((p) => p.kind === "text").map((p) => p.text).join("");

// Append a piece of an answer to its last part, if that is of the same kind.
export function appendPiece(message, kind, text) {
  const last = message.parts.at(-1);
  if (last && last.kind === kind) last.text += text; else message.parts.push({ kind, text });
}

// What two tabs stored of one conversation, together: all messages of both, each as it was changed last.
export function merge(stored, own) {
  if (!stored) return own;
  const newer = own.changed >= stored.changed ? own : stored, older = newer === own ? stored : own;
  const messages = { ...stored.messages };
  for (const m of Object.values(own.messages)) {
    if (!messages[m.id] || messages[m.id].changed <= m.changed) messages[m.id] = m;
  }
  return { ...older, ...newer, messages, chosen: { ...older.chosen, ...newer.chosen } };
}

// A conversation as it may be drawn, or null: stored data may be of an older version, damaged, or someone else's file.
export function checked(value) {
  const isObject = (x) => Boolean(x) && typeof x === "object" && !Array.isArray(x);
  if (!isObject(value) || typeof value.id !== "string" || !isObject(value.messages)) return null;
  const messages = {};
  for (const m of Object.values(value.messages)) {
    if (!isObject(m) || typeof m.id !== "string" || !(m.parent === null || typeof m.parent === "string")) continue;
    const common = { ...m, made: Number(m.made) || 0, changed: Number(m.changed) || 0 };
    if (m.role === "user" && typeof m.text === "string") messages[m.id] = common;
    else if (m.role === "assistant" && Array.isArray(m.parts)) {
      const parts = m.parts.filter((p) => isObject(p) && typeof p.text === "string" && typeof p.kind === "string");
      messages[m.id] = { ...common, parts, tokens: Array.isArray(m.tokens) ? m.tokens : undefined };
    }
  }
  return { ...value, messages, chosen: isObject(value.chosen) ? value.chosen : {}, title: String(value.title ?? ""),
    made: Number(value.made) || 0, changed: Number(value.changed) || 0 };
}

// A list of messages, as older versions of the page and other programs keep it, as a conversation. A message is
// {role, content, ...}.
export function fromList(list, title = "", made = Date.now()) {
  const conversation = { ...newConversation(), title, made };
  let parent = null;
  for (const old of list) {
    if (!old || !["user", "assistant"].includes(old.role)) continue;
    const text = typeof old.content === "string" ? old.content : "";
    const message = old.role === "user" ? { role: "user", text }
      : { role: "assistant", parts: old.parts?.length ? old.parts : [{ kind: "text", text }], end: old.error ? "error" : "stop",
        ...(old.error ? { error: { text: String(old.error) } } : {}) };
    parent = add(conversation, parent, message).id;
  }
  return conversation;
}
