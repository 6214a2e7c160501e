// The conversation's scroll position: it follows the text that is written until the reader scrolls up, and never
// otherwise moves by itself.

import { $ } from "./dom.js";

const NEAR = 8;  // px from the end that still count as there
let following = true, held = false;  // held: the mouse button is pressed, for example to select text
let top = 0;  // where the last drawing or the reader left the scroll position

const log = () => $("log");
const end = () => log().scrollHeight - log().clientHeight;
const atEnd = () => log().scrollTop >= end() - NEAR;
const update = () => $("newest").classList.toggle("hidden", following || atEnd());

// By whatever means: wheel, touch, scroll bar, keys, a search. A shorter text moves the position up, too, but to its end.
const readerScrolledUp = () => log().scrollTop < Math.min(top, end()) - 0.5;

export function setUpFollowing() {
  const box = log();
  const letGo = () => { following = false; update(); };
  box.addEventListener("wheel", (event) => { if (event.deltaY < 0 && box.scrollTop > 0) letGo(); }, { passive: true });
  box.addEventListener("scroll", () => {
    if (readerScrolledUp()) following = false;
    else if (box.scrollTop > top && atEnd()) following = true;
    if (!following) top = box.scrollTop;
    update();
  }, { passive: true });
  // A press on the box itself may be one on its scroll bar, whose end is not reported.
  box.addEventListener("pointerdown", (event) => { held = event.pointerType === "mouse" && event.target !== box; });
  for (const name of ["pointerup", "pointercancel"]) {
    addEventListener(name, () => {
      if (held && !getSelection().isCollapsed) letGo();
      held = false;
    });
  }
  new ResizeObserver(follow).observe(box);  // its own size: the window, the keyboard, what is being written below it
  new MutationObserver(follow).observe(box, { childList: true, subtree: true, characterData: true });
  $("newest").addEventListener("click", () => { toEnd(); box.focus({ preventScroll: true }); });
}

export function toEnd() {
  following = true;
  log().scrollTop = log().scrollHeight;
  top = log().scrollTop;
  update();
}

// After something was drawn.
function follow() {
  if (readerScrolledUp()) following = false;
  if (following && !held) toEnd(); else update();
}
