// Small helpers around the DOM. Text from models and files only ever becomes text nodes, or goes through markdown.js.

export const $ = (id) => document.getElementById(id);

export const touchScreen = matchMedia("(pointer: coarse)");

// An element: properties where it has them, attributes else; on* are listeners.
export function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const button = (text, onclick, props = {}) => make("button", { type: "button", onclick, ...props }, text);

// Whether this key sends the text that is written. On a touch screen there is no Shift, and Enter makes a line.
export function isSendKey(event) {
  const composing = event.isComposing || event.keyCode === 229;  // Safari ends composing before the key that ends it
  if (event.key !== "Enter" || event.shiftKey || composing) return false;
  return !touchScreen.matches || event.ctrlKey || event.metaKey;
}

// Say something to screen readers.
export const announce = (text) => { $("announce").textContent = withoutOverrides(text); };

export async function copyText(text, from) {
  try { await navigator.clipboard.writeText(text); }
  catch {  // without https there is no clipboard
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = from.textContent;
  if (before !== "Copied") setTimeout(() => { from.textContent = before; }, 1500);
  from.textContent = "Copied";
  announce("Copied");
}

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// A notice at the foot of the page, with a button; it leaves after `seconds` (0: when its button is pressed).
export function notice(text, action = "", run = () => {}, seconds = 10, expired = () => {}) {
  const box = make("div", { className: "notice", role: "status" }, make("span", {}, withoutOverrides(text)));
  const close = () => { clearTimeout(timer); box.remove(); };
  const timer = seconds ? setTimeout(() => { close(); expired(); }, seconds * 1000) : 0;
  box.append(button(action || "Close", () => { close(); run(); }));
  $("notices").append(box);
  return close;
}

// Direction overrides and isolates turn the text around them; they are shown by their name instead.
export const withoutOverrides = (text) => text.replace(/([\u202a-\u202e\u2066-\u2069])\1*/g,
  (run, c) => `⟦U+${c.codePointAt(0).toString(16).toUpperCase()}${run.length > 1 ? ` ×${run.length}` : ""}⟧`);
