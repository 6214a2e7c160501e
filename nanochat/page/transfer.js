// Conversations as files: JSON with all versions, and Markdown, to read, with the versions that are shown. Both can be
// imported again, and so can lists of messages as OpenAI and ShareGPT have them.

import { checked, fromList } from "./checked.js";
import { merge, newId, steps } from "./tree.js";

export const MAX_BYTES = 200 * 2 ** 20;  // of a file

export const toJson = (conversations) =>
  `{"format":"nanochat conversations","version":1,"conversations":[\n${conversations.map((c) => JSON.stringify(c)).join(",\n")}\n]}\n`;

// ---- Markdown -------------------------------------------------------------------------------------------------------
// Before each part stands a comment, which readers of Markdown do not show, with a name that occurs nowhere in the texts.

export function toMarkdown(conversation) {
  const title = conversation.title.replace(/\s+/g, " ") || "Conversation";
  const parts = steps(conversation).flatMap(({ message }) => message.role === "user" ? [["user", message.text]]
    : [["assistant", message.model ?? ""], ...message.parts.map((part) => [part.kind, part.text])]);
  let name = 1;
  while ([title, ...parts.flat()].some((text) => text.includes(`nanochat-${name}:`))) name++;
  const shown = { user: (text) => `## You\n\n${text}`, assistant: (model) => `## ${model || "Answer"}`, text: (text) => text,
    python: (text) => `Tool call:\n\n${fenced(text)}`, python_output: (text) => `Tool's answer:\n\n${fenced(text)}` };
  const written = parts.map(([kind, text]) => `<!-- nanochat-${name}: ${kind} -->\n${shown[kind](text)}\n\n`);
  return `<!-- nanochat-${name}: conversation -->\n# ${title}\n\n${written.join("")}`;
}

// A code block whose fence is longer than any run of backticks in the text.
export function fenced(text, language = "") {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map((run) => run[0].length));
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${text}\n${fence}`;
}

// The conversation in such a file, or null.
function fromMarkdown(text) {
  const begin = /^<!-- (nanochat-\d+:) conversation -->(\r?)\n# (.*)/.exec(text);
  if (!begin) return null;
  const plain = begin[2] ? text.replaceAll("\r\n", "\n") : text, list = [];
  const parts = plain.split(new RegExp(`^<!-- ${begin[1]} (\\w+) -->\n`, "m")).slice(3);  // kind, text, kind, text, ...
  for (let i = 0; i + 1 < parts.length; i += 2) {
    const kind = parts[i], body = parts[i + 1].replace(/\n{0,2}$/, ""), last = list.at(-1);
    if (kind === "user") list.push({ role: "user", content: body.replace(/^## You\n\n/, "") });
    else if (kind === "assistant") list.push({ role: "assistant", model: body.replace(/^## /, ""), parts: [] });
    else last?.parts?.push({ kind, text: kind === "text" ? body : body.split("\n").slice(3, -1).join("\n") });
  }
  return fromList(list, begin[3].trim());
}

// ---- reading files --------------------------------------------------------------------------------------------------

const isMessages = (value) => Array.isArray(value) && value.length > 0 && value.every((m) => m && typeof m === "object" && "role" in m);
const ROLES = { human: "user", user: "user", gpt: "assistant", assistant: "assistant" };  // ShareGPT's

// What a file holds, as {conversations, left: what could not be taken}. Throws an Error that says what is wrong.
export function fromFile(text) {
  const marked = fromMarkdown(text);
  if (marked) return found([marked], 0);
  let value;
  try { value = JSON.parse(text); }
  catch {
    try { value = text.split("\n").filter((row) => row.trim()).map((row) => JSON.parse(row)); }
    catch { throw new Error("This is neither a JSON file of conversations nor Markdown that this page exported."); }
  }
  const own = value?.format === "nanochat conversations";
  if (own && value.version !== 1) throw new Error("This file was exported by a newer version of the page.");
  const items = own && Array.isArray(value.conversations) ? value.conversations : Array.isArray(value) && !isMessages(value) ? value : [value];
  const lists = items.map(conversationOf);
  return found(lists.map(([c]) => c), lists.reduce((sum, [, left]) => sum + left, 0));
}

function found(all, left) {
  const conversations = all.filter((c) => c && Object.keys(c.messages).length);
  if (!conversations.length) throw new Error("There are no conversations in this file.");
  for (const message of conversations.flatMap((c) => Object.values(c.messages))) if (message.role === "assistant") message.end ??= "stopped";
  return { conversations, left: left + all.length - conversations.length };
}

// [conversation or null, number of messages left out]
function conversationOf(item) {
  let list = isMessages(item) ? item : isMessages(item?.messages) ? item.messages : null;
  if (!list && Array.isArray(item?.conversations)) list = item.conversations.map((m) => ({ role: Object.hasOwn(ROLES, m?.from) ? ROLES[m.from] : "", content: m?.value }));
  if (!list) {
    const own = checked(item);
    return [own, own ? Object.keys(item.messages).length - Object.keys(own.messages).length : 0];
  }
  const title = typeof item.title === "string" ? item.title : "", made = fromList(list, title);
  return [made, list.length - Object.keys(made.messages).length];
}

// Add imported conversations to those there are; one that is there already gets the messages it lacks. Returns those
// that are new or have changed.
export function addImported(chats, imported) {
  return imported.map((one) => {
    const own = chats.get(one.id);
    if (!own) { chats.set(one.id, { ...one, deleted: 0 }); return chats.get(one.id); }
    const before = Object.keys(own.messages).length, deleted = own.deleted;
    Object.assign(own, merge(one, own), { deleted: 0 });
    return deleted || Object.keys(own.messages).length > before ? own : null;
  }).filter(Boolean);
}

export const fileName = (conversation, ending) =>
  `${conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 50) || newId()}.${ending}`;
