// An answer's tokens with their probabilities, compactly: [id, text, share, [[id, text, share], ...]] for each, where
// share is the probability, null for a token that a tool gave, and the list holds the likeliest tokens there.

const rounded = (logprob) => Number(Math.exp(logprob).toPrecision(4));

// From an entry of OpenAI's `logprobs.content`; `id` is this server's own field.
export const fromLogprob = (entry) => [entry.id ?? -1, entry.token, entry.forced ? null : rounded(entry.logprob),
  (entry.top_logprobs || []).map((other) => [other.id ?? -1, other.token, rounded(other.logprob)])];

export const tokenId = (token) => token[0];
export const tokenText = (token) => token[1];
export const share = (token) => token[2];

// The token's alternatives, likeliest first, with itself among them: top-k lists leave it out when it was unlikely.
export function alternatives(token) {
  const [id, text, own, top] = token;
  const all = top.some(([other]) => other === id) ? top : [...top, [id, text, own ?? 0]];
  return all.map(([otherId, otherText, otherShare]) => ({ id: otherId, text: otherText, share: otherShare, chosen: otherId === id }))
    .sort((a, b) => b.share - a.share);
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

// A token's text as it can be seen: blanks, line ends and control characters have signs.
export const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥")
  .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (c) => "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"));
