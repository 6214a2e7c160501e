// An answer's tokens with their probabilities, compactly: [id, text, share, [[id, text, share], ...]] for each, where
// share is the probability, null for a token that a tool gave, and the list holds the likeliest tokens there. The text
// of a token that has only a part of a character is a list of its bytes.

const rounded = (logprob) => Number(Math.exp(logprob).toPrecision(4));
const textIn = (entry) => entry.token.includes("\ufffd") && entry.bytes ? entry.bytes : entry.token;

// From an entry of OpenAI's `logprobs.content`; `id` is this server's own field.
export const fromLogprob = (entry) => [entry.id ?? -1, textIn(entry), entry.forced ? null : rounded(entry.logprob),
  (entry.top_logprobs || []).map((other) => [other.id ?? -1, textIn(other), rounded(other.logprob)])];

export const tokenId = (token) => token[0];
export const share = (token) => token[2];

const isShare = (value) => typeof value === "number" && value >= 0 && value <= 1;
const isText = (value) => typeof value === "string" || (Array.isArray(value) && value.every((byte) => Number.isInteger(byte)));
const isEntry = (value) => Array.isArray(value) && Number.isInteger(value[0]) && isText(value[1]) && (value[2] === null || isShare(value[2]));

// Whether a value from storage or a file is such a token.
export const isToken = (value) => isEntry(value) && Array.isArray(value[3]) && value[3].every(isEntry);

// The token's alternatives, likeliest first, with itself among them: top-k lists leave it out when it was unlikely.
export function alternatives(token) {
  const [id, text, own, top] = token;
  const all = top.some(([other]) => other === id) ? top : [...top, [id, text, own ?? 0]];
  return all.map(([otherId, otherText, otherShare]) => ({ id: otherId, text: otherText, share: otherShare, chosen: otherId === id }))
    .sort((a, b) => b.share - a.share);
}

const SPECIAL = /^<\|.*\|>$/s;
export const isSpecial = ([, text]) => typeof text === "string" && SPECIAL.test(text);

// Whether an answer can go on after this alternative: a tool call may begin or end there, but the answer's end is its end.
export const canFollow = ({ id, text }) => id >= 0 && (!isSpecial([id, text]) || ["<|python_start|>", "<|python_end|>"].includes(text));

// A function that returns the text of one token after the other, "" for one that only begins a character: the token
// that completes it has it.
export function shownText() {
  const decoder = new TextDecoder();
  return ([, text]) => typeof text === "string" ? decoder.decode() + text : decoder.decode(Uint8Array.from(text), { stream: true });
}

// `12%`, `0.04%`: at least two digits where it is small, never 0% or 100% of what is neither.
export function percent(value) {
  if (value === null) return "–";
  const scaled = value * 100;
  if (scaled >= 99.5 && value < 1) return ">99%";
  return (scaled >= 9.95 ? Math.round(scaled) : scaled === 0 ? 0 : scaled >= 0.001 ? Number(scaled.toPrecision(2)) : "<0.001") + "%";
}

// A step of the scale from 0 (unlikely) to 5 (certain), for its colour.
export const level = (value) => value === null ? "forced" : String([0.05, 0.2, 0.4, 0.7, 0.95].filter((limit) => value >= limit).length);

const hex = (number, digits) => number.toString(16).toUpperCase().padStart(digits, "0");

// A token as it can be seen by itself: blanks, line ends and control characters have signs, bytes are hexadecimal.
export const tokenName = ([, text]) => typeof text === "string" ? visible(text) : `bytes ${text.map((byte) => hex(byte, 2)).join(" ")}`;

const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥")
  .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, (c) => "U+" + hex(c.codePointAt(0), 4));
