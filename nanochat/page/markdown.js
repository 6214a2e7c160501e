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
// A list, quotation or table has the direction of its text (style.css: so has each paragraph). A column's alignment is
// an attribute: the content policy forbids styles.
for (const name of ["blockquote", "bullet_list", "ordered_list", "table", "td", "th"]) {
  parser.renderer.rules[name + "_open"] = (tokens, i, options, env, self) => {
    const token = tokens[i], [, align] = /^text-align:(\w+)$/.exec(token.attrGet("style")) ?? [];
    if (name.length === 2) token.attrs = align ? [["align", align]] : null;
    else token.attrSet("dir", "auto");
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
    if (!box || first?.type !== "text") return;
    first.content = (box[1] === " " ? "☐ " : "☑ ") + first.content.replace(/^\[[ xX]\] ?/, "");
    tokens[i - 2].attrSet("class", "task");
  });
});
// The HTML that GitHub's readers write in sentences and table cells; all other HTML stays text.
const TAG = /<(?:br *\/?|\/?(?:sub|sup|kbd))>/iy;
parser.inline.ruler.before("autolink", "tag", (state, silent) => {
  TAG.lastIndex = state.pos;
  const tag = state.src[state.pos] === "<" && TAG.exec(state.src)?.[0];
  if (!tag) return false;
  if (!silent) state.push("html_inline", "", 0).content = tag;
  state.pos += tag.length;
  return true;
});
// www.example.com is a link as https://example.com is; other bare names are not: nanochat.py is a file.
parser.linkify.add("www.", {
  validate: (text, at) => /^[a-z\d-]+(?:\.[a-z\d-]+)+(?:[/?#][^\s<>"')\]]*[^\s<>"')\].,:;!?])?/i.exec(text.slice(at, at + 2000))?.[0].length ?? 0,
  normalize: (match) => { match.url = "https://" + match.url; },
});

// ---- formulas: $$…$$ and \[…\] as blocks, \(…\) and $…$ within a line ------------------------------------------

const DELIMITERS = [["$$", "$$"], ["\\[", "\\]"], ["\\(", "\\)"], ["$", "$"]];
const LONGEST = 5000;  // characters of a formula

// Where `closer` comes next; the answer is kept, since a text may have very many openers.
function nextAt(state, closer, from) {
  const known = state.closers ??= {};
  if (!(known[closer] >= from)) known[closer] = (state.src.indexOf(closer, from) + 1 || Infinity) - 1;
  return known[closer];
}

// Whether $…$ is a formula and not an amount of money, a shell variable or the like.
function isFormula(text, before, after) {
  if (/^\s|[\s\\]$|\n/.test(text) || /[\w$\\]/.test(before) || /[\w$]/.test(after)) return false;
  return !/^\d/.test(text) || /[\\^_={}<>]/.test(text) || !/[a-z]{2}|[,;–-] ?$|, /i.test(text);
}

function pushFormula(state, content, block) {
  Object.assign(state.push("formula", "", 0), { content, block });
}

parser.inline.ruler.before("escape", "formula", (state, silent) => {
  const { src, pos } = state, [opener, closer] = DELIMITERS.find(([start]) => src.startsWith(start, pos)) ?? [];
  if (!opener) return false;
  const start = pos + opener.length, end = nextAt(state, closer, start);
  if (end > Math.min(start + LONGEST, state.posMax)) return false;
  const content = src.slice(start, end);
  if (!content.trim()) return false;
  if (opener === "$" && !isFormula(content, src[pos - 1] ?? "", src[end + 1] ?? "")) return false;
  if (!silent) pushFormula(state, content, opener === "$$" || opener === "\\[");
  state.pos = end + closer.length;
  return true;
});
// As a block of its own, whose lines are no lists or headings.
parser.block.ruler.before("fence", "formula", (state, startLine, endLine, silent) => {
  const start = state.bMarks[startLine] + state.tShift[startLine];
  const [opener, closer] = DELIMITERS.slice(0, 2).find(([opening]) => state.src.startsWith(opening, start)) ?? [];
  if (!opener || state.sCount[startLine] - state.blkIndent >= 4) return false;
  const end = nextAt(state, closer, start + 2);
  if (end - start > LONGEST || !state.src.slice(start + 2, end).trim()) return false;
  let line = startLine;
  while (line < endLine && state.eMarks[line] < end) line++;
  if (line >= endLine || state.src.slice(end + 2, state.eMarks[line]).trim()) return false;
  if (!silent) pushFormula(state, state.getLines(startLine, line + 1, state.blkIndent, false).trim().slice(2, -2), true);
  state.line = line + 1;
  return true;
}, { alt: ["paragraph", "reference", "blockquote", "list"] });
parser.renderer.rules.formula = (tokens, i) =>
  `<code class="formula${tokens[i].block ? " block" : ""}">${parser.utils.escapeHtml(tokens[i].content)}</code>`;

const ALLOWED = {
  ALLOWED_TAGS: "div p br strong em s sub sup kbd code pre blockquote ul ol li h2 h3 h4 h5 h6 hr a table thead tbody tr th td".split(" "),
  ALLOWED_ATTR: "href dir start class align".split(" "),
  RETURN_DOM_FRAGMENT: true,
};

const MOST_ELEMENTS = 5000;  // in a block; with more, which only a mistake or an attack writes, it is shown as it was written

// The HTML of each top-level block.
export function blocks(text) {
  const source = withoutOverrides(text), tokens = parser.parse(source, {}), found = [];
  let first = 0, depth = 0, lines = null;
  tokens.forEach((token, i) => {
    depth += token.nesting;
    if (depth > 0) return;
    const html = parser.renderer.render(tokens.slice(first, i + 1), parser.options, {});
    if (html.length > 4 * MOST_ELEMENTS && html.match(/<\w/g)?.length > MOST_ELEMENTS) {
      lines ??= source.split("\n");
      found.push(`<pre><code>${parser.utils.escapeHtml(lines.slice(...tokens[first].map).join("\n"))}</code></pre>`);
    } else found.push(html);
    first = i + 1;
  });
  return found;
}

// The elements of blocks; DOMPurify takes as long for one as for hundreds.
function nodesOf(htmls, complete, box) {
  const made = globalThis.DOMPurify.sanitize(htmls.map((html) => `<div class="block">${html}</div>`).join(""), ALLOWED);
  made.querySelectorAll("pre").forEach((pre) => decorateCode(pre, complete || made.lastChild.contains(pre) === false, box));
  for (const formula of [...made.querySelectorAll("code.formula")].slice(0, MOST_FORMULAS)) drawFormula(formula, box);
  for (const link of made.querySelectorAll("a")) Object.assign(link, { rel: "noopener noreferrer nofollow", target: "_blank" });
  for (const table of made.querySelectorAll("table")) {
    const frame = make("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return [...made.children];
}

// Draw `text` in `box`. What has not changed stays, in the last block too: a selection, a scroll position or the focus
// in it survives. The last block of a text that is still written is drawn without colours.
export function drawMarkdown(box, text, complete = true) {
  const wanted = blocks(text), drawn = box.drawnBlocks || [];
  const keys = wanted.map((html, i) => html + (complete || i < wanted.length - 1 ? "\u0000" : ""));
  const changed = [...keys.keys()].filter((i) => drawn[i] !== keys[i]);
  const nodes = changed.length ? nodesOf(changed.map((i) => wanted[i]), complete || changed.at(-1) < wanted.length - 1, box) : [];
  changed.forEach((i, n) => { if (i < drawn.length) patch(box.children[i], nodes[n]); else box.append(nodes[n]); });
  while (box.children.length > wanted.length) box.lastChild.remove();
  Object.assign(box, { drawnBlocks: keys, redraw: () => { box.drawnBlocks = keys.map(() => ""); drawMarkdown(box, text, complete); } });
}

// Make `old` like `wanted`, keeping the nodes that are the same.
function patch(old, wanted) {
  if (old.nodeName !== wanted.nodeName || old.className !== wanted.className || old.formula !== wanted.formula) return old.replaceWith(wanted);
  if (old.formula) return;
  if (old.nodeType === Node.TEXT_NODE) {
    if (wanted.data.startsWith(old.data)) old.appendData(wanted.data.slice(old.data.length));
    else old.data = wanted.data;
    return;
  }
  for (const { name } of [...old.attributes]) if (!wanted.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of wanted.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const now = [...old.childNodes], then = [...wanted.childNodes];
  then.forEach((child, i) => { if (now[i]) patch(now[i], child); else old.append(child); });
  for (const child of now.slice(then.length)) child.remove();
}

// ---- code and formulas: libraries that are loaded at their first use ----------------------------------------------

const script = (src) => new Promise((resolve, reject) => document.head.append(make("script", { src, onload: resolve, onerror: reject })));
const libraries = {
  colours: { load: async () => (await import("./vendor/highlight.min.js")).default },
  formulas: {
    load: async () => {
      document.head.append(make("link", { rel: "stylesheet", href: "page/vendor/temml.css" }));
      await script("page/vendor/temml.min.js");
      return globalThis.temml;
    },
  },
};

// The library, or null: then `box` is drawn again once it is loaded.
function library(name, box) {
  const found = libraries[name];
  if (found.value !== undefined) return found.value;
  found.waiting ??= new Set();
  found.waiting.add(box);
  found.loading ??= found.load().catch(() => null).then((value) => {
    found.value = value;
    for (const waiting of found.waiting) waiting.redraw();
    found.waiting.clear();
  });
  return null;
}

function decorateCode(pre, complete, box) {
  const code = pre.firstElementChild || pre, language = /language-(\S+)/.exec(code.className)?.[1] || "";
  const text = code.textContent.replace(/\n$/, "");
  const copy = button("Copy", () => copyText(copy.closest(".code").querySelector("pre").textContent, copy), { "aria-label": "Copy code" });
  pre.tabIndex = 0;
  pre.setAttribute("dir", "ltr");
  const frame = make("div", { className: "code" }, make("div", { className: "bar" }, make("span", {}, language || "code"), copy));
  pre.replaceWith(frame);
  frame.append(pre);
  const colours = complete && language && text.length < MOST_COLOURED && library("colours", box);
  if (!colours || !colours.getLanguage(language)) return;
  const html = colours.highlight(text, { language, ignoreIllegals: true }).value;
  code.replaceChildren(globalThis.DOMPurify.sanitize(html, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }));
}

const MOST_COLOURED = 10_000;  // characters of code; some grammars take long for odd texts
const MOST_FORMULAS = 1000;  // drawn at once, at about 1 ms each
const LARGEST = [20, 200];  // em and pt: sizes that a formula may ask for
// In place: Temml sets styles as properties, which the content policy allows, and as text it would not.
const MATH = { USE_PROFILES: { mathMl: true }, ADD_ATTR: ["class", "style"], FORBID_ATTR: ["href"], IN_PLACE: true };

function drawFormula(node, box) {
  const source = node.textContent, block = node.classList.contains("block"), formulas = library("formulas", box);
  if (!formulas) return;
  const frame = make("span", { className: block ? "formula-block" : "formula", title: source });
  try {
    formulas.render(source, frame, { displayMode: block, throwOnError: true, trust: false, maxExpand: 200, maxSize: LARGEST });
    frame.replaceChildren(globalThis.DOMPurify.sanitize(frame.querySelector("math"), MATH));
  } catch { return; }  // what is no formula stays as it was written
  frame.formula = source;
  if (block) frame.tabIndex = 0;
  node.replaceWith(frame);
}
