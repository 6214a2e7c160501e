// Stored data and files as conversations: they may be of an older version of the page, damaged, or made to harm. Only
// the fields of tree.js are taken, each if it is what it should be.

import { isToken } from "./tokens.js";
import { add, newConversation } from "./tree.js";

const LATEST = 7e12;  // ms: a time after the year 2191 is none
const isObject = (x) => Boolean(x) && typeof x === "object" && !Array.isArray(x);
const isId = (x) => typeof x === "string" && x.length > 0 && x.length <= 200 && !(x in {});  // not "__proto__" or the like
const time = (x) => x > 0 ? Math.min(Number(x), LATEST) : 0;
const count = (x) => Number.isSafeInteger(x) && x > 0 ? x : 0;
const KINDS = ["text", "python", "python_output"], ENDS = ["stop", "length", "stopped", "error"];

// A message, or null.
function message(value) {
  if (!isObject(value) || !isId(value.id) || !(value.parent === null || isId(value.parent))) return null;
  const { id, parent, role } = value, common = { id, parent, role, made: time(value.made), changed: time(value.changed) };
  if (role === "user") return typeof value.text === "string" ? { ...common, text: value.text } : null;
  if (role !== "assistant" || !Array.isArray(value.parts)) return null;
  const { error, usage, tokens } = value;
  const made = { ...common, from: count(value.from),
    parts: value.parts.filter((p) => isObject(p) && typeof p.text === "string" && KINDS.includes(p.kind)).map(({ kind, text }) => ({ kind, text })) };
  if (ENDS.includes(value.end)) made.end = value.end;
  if (count(value.cut)) made.cut = value.cut;
  if (Number.isSafeInteger(value.dropped)) made.dropped = value.dropped;
  if (typeof value.model === "string") made.model = value.model.slice(0, 200);
  if (Array.isArray(tokens) && tokens.every(isToken)) made.tokens = tokens;
  if (typeof error?.text === "string") made.error = { text: error.text.slice(0, 1000), action: String(error.action) };
  if (isObject(usage) && count(usage.tokens)) made.usage = { tokens: usage.tokens, total: count(usage.total), seconds: usage.seconds > 0 ? Number(usage.seconds) : 0 };
  return made;
}

// A conversation, or null. A message whose own parent was lost becomes a first one, so that it can be found.
export function checked(value) {
  if (!isObject(value) || !isId(value.id) || !isObject(value.messages)) return null;
  const messages = {}, chosen = {};
  for (const m of Object.values(value.messages).map(message)) if (m) messages[m.id] = m;
  for (const m of Object.values(messages)) if (m.parent !== null && !Object.hasOwn(messages, m.parent)) m.parent = null;
  for (const [id, next] of Object.entries(isObject(value.chosen) ? value.chosen : {})) if (typeof next === "string" && !(id in {})) chosen[id] = next;
  const title = ["string", "number"].includes(typeof value.title) ? String(value.title).slice(0, 200) : "";
  return { id: value.id, title, made: time(value.made), changed: time(value.changed), deleted: time(value.deleted), messages, chosen };
}

// A name for a text, the same for the same text; not for secrets.
function nameOf(text) {
  let a = 1, b = 2;
  for (let i = 0; i < text.length; i++) {
    a = Math.imul(a ^ text.charCodeAt(i), 0x01000193);
    b = Math.imul(b + text.charCodeAt(i), 0x27d4eb2f) ^ (b >>> 15);
  }
  return (a >>> 0).toString(36) + (b >>> 0).toString(36);
}

// The text of a message's content: a string, or a list of parts as OpenAI has them.
const contentText = (content) => typeof content === "string" ? content
  : Array.isArray(content) ? content.map((part) => part?.type === "text" && typeof part.text === "string" ? part.text : "").join("") : "";

// A list of messages {role, content}, as earlier versions of the page and other programs keep it, as a conversation. Its
// ids come from its content: the same list imported again is the same conversation.
export function fromList(list, title = "", id = "list-" + nameOf(JSON.stringify(list)), made = Date.now()) {
  const conversation = newConversation(id, title, made);
  let parent = null;
  for (const [number, old] of list.entries()) {
    if (!["user", "assistant"].includes(old?.role)) continue;
    const own = { id: `${id}-${number}`, made: made + number, changed: made, role: old.role }, text = contentText(old.content);
    if (old.role === "user") own.text = text;
    else Object.assign(own, { parts: old.parts?.length ? old.parts : [{ kind: "text", text }], end: old.error ? "error" : "stop" });
    if (old.model) own.model = old.model;
    if (old.error) own.error = { text: String(old.error) };
    parent = add(conversation, parent, own).id;
  }
  conversation.changed = made;
  return checked(conversation);
}
