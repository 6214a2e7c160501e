// A conversation is a tree of messages: editing a question or asking again adds a branch beside the old one, and a path
// leads through it, by the child chosen at each message. All functions here are pure but for the conversation they are
// given. A message:
//   id, parent (null for the first), role "user" | "assistant", made, changed (ms)
//   user:       text
//   assistant:  parts [{kind: "text" | "python" | "python_output", text}], tokens (tokens.js) or undefined,
//               end: undefined while it is written, then "stop" | "length" | "stopped" | "error"
//               error {text, action}, usage {tokens, total (with the prompt), seconds}, dropped: earlier messages the server left out,
//               cut: characters at the text's beginning that a base model was not given,
//               from: how many of its first tokens were given (a branch, or what was continued), model

export const newId = () => crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}`;

export function newConversation(id = newId(), title = "", made = Date.now()) {
  return { id, made, changed: made, title, messages: {}, chosen: {}, deleted: 0 };
}

// Set the time of a change: later than the one before even if the clock was set back, since merging keeps the latest.
export const touch = (thing) => { thing.changed = Math.max(Date.now(), thing.changed + 1); };

const ROOT = "";  // stands for "no parent" in `chosen`
const inOrder = (a, b) => a.made - b.made || (a.id < b.id ? -1 : 1);

// The messages that continue `parent` (null: the conversation's first messages), oldest first.
export const children = (conversation, parent) => Object.values(conversation.messages).filter((m) => m.parent === parent).sort(inOrder);

// The messages along the chosen versions, as [{message, number, count}]: version `number` of `count`.
export function steps(conversation) {
  const byParent = new Map(), found = [];
  for (const m of Object.values(conversation.messages)) {
    if (!byParent.has(m.parent)) byParent.set(m.parent, []);
    byParent.get(m.parent).push(m);
  }
  for (let parent = null; byParent.has(parent);) {
    const versions = byParent.get(parent).sort(inOrder);
    byParent.delete(parent);  // so that damaged data cannot lead in a circle
    const wanted = versions.findIndex((m) => m.id === conversation.chosen[parent ?? ROOT]);
    const index = wanted < 0 ? versions.length - 1 : wanted;
    found.push({ message: versions[index], number: index + 1, count: versions.length });
    parent = versions[index].id;
  }
  return found;
}

export const path = (conversation) => steps(conversation).map((step) => step.message);

// Show the version `step` places from this one.
export function chooseVersion(conversation, message, step) {
  const versions = children(conversation, message.parent);
  const next = versions[versions.indexOf(message) + step];
  if (next) choose(conversation, next);
  return next;
}

export function choose(conversation, message) {
  conversation.chosen[message.parent ?? ROOT] = message.id;
  touch(conversation);
}

// Choose the versions that lead to a message.
export function reveal(conversation, message) {
  const seen = new Set();
  for (let m = message; m && !seen.has(m); m = conversation.messages[m.parent]) {
    seen.add(m);
    choose(conversation, m);
  }
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

// When something was last asked or answered in it; renaming it or looking at other versions does not count.
export const lastUsed = (conversation) => Object.values(conversation.messages).reduce((latest, m) => Math.max(latest, m.made), conversation.made);

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
  return { ...newer, messages, chosen: { ...older.chosen, ...newer.chosen } };
}
