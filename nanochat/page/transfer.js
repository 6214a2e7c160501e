// Conversations as files: JSON, which can be imported again, and Markdown to read.

import { checked, fromList, merge, newConversation, path, version } from "./tree.js";

export const toJson = (conversations) => JSON.stringify({ format: "nanochat conversations", version: 1, conversations }, null, 1);

// The path that is shown, as Markdown.
export function toMarkdown(conversation) {
  const lines = [`# ${conversation.title || "Conversation"}`, ""];
  for (const message of path(conversation)) {
    const [number, count] = version(conversation, message);
    lines.push(`## ${message.role === "user" ? "You" : message.model || "nanochat"}${count > 1 ? ` (version ${number} of ${count})` : ""}`, "");
    for (const part of message.role === "user" ? [{ kind: "text", text: message.text }] : message.parts) {
      if (part.kind === "text") lines.push(part.text, "");
      else lines.push(part.kind === "python" ? "Tool call:" : "Tool's answer:", "", fenced(part.text), "");
    }
  }
  return lines.join("\n");
}

// A code block whose fence is longer than any run of backticks in the text.
export function fenced(text, language = "") {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map((run) => run[0].length));
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${text}\n${fence}`;
}

// The conversations in a file: this page's, OpenAI-style messages, or ShareGPT's. Throws an Error that says what is wrong.
export function fromFile(text) {
  let value;
  try { value = JSON.parse(text); }
  catch {
    const rows = text.split("\n").filter((row) => row.trim());
    try { value = rows.map((row) => JSON.parse(row)); } catch { throw new Error("This is not a JSON file of conversations."); }
  }
  const items = Array.isArray(value?.conversations) && value.format ? value.conversations : isMessages(value) ? [value] : Array.isArray(value) ? value : [value];
  const found = items.map(conversationOf).filter((c) => c && path(c).length);
  if (!found.length) throw new Error("There are no conversations in this file.");
  return found;
}

const isMessages = (value) => Array.isArray(value) && value.length > 0 && value.every((m) => m && typeof m === "object" && "role" in m);

function conversationOf(item) {
  if (isMessages(item)) return fromList(item, firstText(item));
  const own = checked(item);
  if (own) return own;
  if (isMessages(item?.messages)) return fromList(item.messages, String(item.title ?? firstText(item.messages)));
  if (Array.isArray(item?.conversations)) {
    const roles = { human: "user", user: "user", gpt: "assistant", assistant: "assistant" };
    const list = item.conversations.map((m) => ({ role: roles[m?.from], content: m?.value }));
    return fromList(list, String(item.title ?? firstText(list)));
  }
  return null;
}

const firstText = (list) => String(list.find((m) => m.role === "user")?.content ?? "").slice(0, 80);

// Add imported conversations to those there are: one that is there already gets the messages it lacks.
export function addImported(chats, imported) {
  const byId = new Map(chats.map((c) => [c.id, c])), changed = [];
  for (const one of imported) {
    const merged = { ...merge(byId.get(one.id), one), deleted: undefined };
    byId.set(merged.id, merged);
    changed.push(merged);
  }
  return { chats: [...byId.values()], changed };
}

export const fileName = (conversation, ending) =>
  `${(conversation.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 50) || newConversation().id}.${ending}`;

