// Markdown as DOM nodes: markdown-it parses it (GitHub's dialect, raw HTML stays text), DOMPurify checks what it made,
// highlight.js colours code and Temml draws formulas; the last two are loaded when there is something for them.

import { button, copyText, make, withoutOverrides } from "./dom.js";

const parser = globalThis.markdownit({ html: false, linkify: true, breaks: true, maxNesting: 60 });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
parser.validateLink = (url) => /^(https?:|mailto:)/i.test(url.trim());

// Nothing is loaded from elsewhere: an image is a link to it.
parser.renderer.rules.image = (tokens, i, options, env, self) => {
  const url = parser.utils.escapeHtml(tokens[i].attrGet("src")), text = self.renderInlineAsText(tokens[i].children, options, env);
  return `<a href="${url}">${parser.utils.escapeHtml(text || tokens[i].attrGet("src"))}</a>`;
};
parser.renderer.rules.link_open = (tokens, i, options, env, self) => {
  tokens[i].attrSet("rel", "noopener noreferrer nofollow");
  tokens[i].attrSet("target", "_blank");
  return self.renderToken(tokens, i, options);
};
for (const name of ["paragraph_open", "heading_open", "blockquote_open", "list_item_open", "td_open", "th_open"]) {
  parser.renderer.rules[name] = (tokens, i, options, env, self) => {
    tokens[i].attrSet("dir", "auto");
    return self.renderToken(tokens, i, options);
  };
}
// The page's own heading is of level 1.
parser.core.ruler.push("headings", (state) => {
  for (const token of state.tokens) if (/^heading_/.test(token.type)) token.tag = "h" + Math.min(6, Number(token.tag[1]) + 1);
});
// - [ ] and - [x]
parser.core.ruler.push("tasks", ({ tokens }) => {
  tokens.forEach((token, i) => {
    const box = token.type === "inline" && tokens[i - 2]?.type === "list_item_open" && /^\[([ xX])\] /.exec(token.content);
    const first = token.children?.[0];
    if (box && first?.type === "text") first.content = (box[1] === " " ? "☐ " : "☑ ") + first.content.replace(/^\[[ xX]\] ?/, "");
  });
});
// $$…$$ and \[…\] as blocks, \(…\) and $…$ within a line; a dollar before a figure is money.
const FORMULA = /\\\[([\s\S]+?)\\\]|\$\$([\s\S]+?)\$\$|\\\(([\s\S]+?)\\\)|\$(?![\s\d])([^$\n]{0,300}?[^\s\\$])\$(?!\d)/y;
parser.inline.ruler.before("escape", "formula", (state, silent) => {
  if (!"\\$".includes(state.src[state.pos])) return false;
  FORMULA.lastIndex = state.pos;
  const found = FORMULA.exec(state.src);
  if (!found) return false;
  if (!silent) {
    const token = state.push("formula", "", 0);
    token.content = found.slice(1).find((part) => part !== undefined);
    token.block = found[1] !== undefined || found[2] !== undefined;
  }
  state.pos += found[0].length;
  return true;
});
parser.renderer.rules.formula = (tokens, i) =>
  `<code class="formula${tokens[i].block ? " block" : ""}">${parser.utils.escapeHtml(tokens[i].content)}</code>`;

const ALLOWED = {
  ALLOWED_TAGS: "p br strong em s code pre blockquote ul ol li h2 h3 h4 h5 h6 hr a table thead tbody tr th td".split(" "),
  ALLOWED_ATTR: "href rel target dir start class align".split(" "),
  RETURN_DOM_FRAGMENT: true,
};

// The HTML of each top-level block.
export function blocks(text) {
  const tokens = parser.parse(withoutOverrides(text), {}), found = [];
  let first = 0, depth = 0;
  tokens.forEach((token, i) => {
    depth += token.nesting;
    if (depth === 0) {
      found.push(parser.renderer.render(tokens.slice(first, i + 1), parser.options, {}));
      first = i + 1;
    }
  });
  return found;
}

function nodesOf(html, complete) {
  const box = make("div", { className: "block" });
  box.append(globalThis.DOMPurify.sanitize(html, ALLOWED));
  for (const pre of box.querySelectorAll("pre")) decorateCode(pre, complete);
  for (const node of box.querySelectorAll("code.formula")) drawFormula(node);
  for (const table of box.querySelectorAll("table")) {
    const frame = make("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return box;
}

// Draw `text` in `box`, whose blocks that have not changed stay: a selection or scroll position in them survives.
// The last block of a text that is still written is drawn without colours.
export function drawMarkdown(box, text, complete = true) {
  const wanted = blocks(text), drawn = box.drawnBlocks || [];
  const last = wanted.length - 1;
  wanted.forEach((html, i) => {
    const key = html + (complete || i < last ? "\u0000" : "");
    if (drawn[i] === key) return;
    const node = nodesOf(html, complete || i < last);
    if (i < box.children.length) box.children[i].replaceWith(node); else box.append(node);
    drawn[i] = key;
  });
  while (box.children.length > wanted.length) box.lastChild.remove();
  drawn.length = wanted.length;
  box.drawnBlocks = drawn;
}

// ---- code and formulas ----------------------------------------------------------------------------------------

function decorateCode(pre, complete) {
  const code = pre.firstElementChild || pre, language = /language-(\S+)/.exec(code.className)?.[1] || "";
  const text = code.textContent.replace(/\n$/, "");
  const copy = button("Copy", () => copyText(text, copy), { "aria-label": "Copy code" });
  pre.tabIndex = 0;
  pre.setAttribute("dir", "ltr");
  const frame = make("div", { className: "code" }, make("div", { className: "bar" }, make("span", {}, language || "code"), copy));
  pre.replaceWith(frame);
  frame.append(pre);
  if (complete && language && text.length < 50_000) colour(code, language, text);
}

let highlighter = null;
async function colour(code, language, text) {
  try {
    highlighter ??= import("./vendor/highlight.min.js");
    const hljs = (await highlighter).default;
    if (!hljs.getLanguage(language)) return;
    const html = hljs.highlight(text, { language, ignoreIllegals: true }).value;
    code.replaceChildren(globalThis.DOMPurify.sanitize(html, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }));
  } catch { /* the code stays as it is, without colours */ }
}

let formulas = null;
const loadFormulas = () => formulas ??= new Promise((resolve, reject) => {
  document.head.append(make("script", { src: "page/vendor/temml.min.js", onload: () => resolve(globalThis.temml), onerror: reject }));
});
async function drawFormula(node) {
  const source = node.textContent, block = node.classList.contains("block");
  if (source.length > 5000) return;
  try {
    const temml = await loadFormulas();
    const html = temml.renderToString(source, { displayMode: block, throwOnError: true, trust: false, maxExpand: 200 });
    const math = globalThis.DOMPurify.sanitize(html, { USE_PROFILES: { mathMl: true }, FORBID_ATTR: ["style", "href"], RETURN_DOM_FRAGMENT: true });
    if (!math.querySelector("math")) return;
    const frame = make("span", { className: block ? "formula-block" : "formula", title: source });
    frame.append(math);
    node.replaceWith(frame);
  } catch { /* what is no formula stays as it was written */ }
}
