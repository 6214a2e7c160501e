// The conversation's scroll position: it follows the text that is written until the reader scrolls up, and never
// otherwise moves by itself.

import { $ } from "./dom.js";

const NEAR = 8;  // px from the end that still count as there
let following = true, top = 0;

const log = () => $("log");
const atEnd = () => log().scrollHeight - log().scrollTop - log().clientHeight <= NEAR;

function letGo() { following = false; update(); }
const update = () => $("newest").classList.toggle("hidden", following || atEnd());

export function setUpFollowing() {
  const box = log();
  box.addEventListener("wheel", (event) => { if (event.deltaY < 0) letGo(); }, { passive: true });
  box.addEventListener("touchmove", () => { if (!atEnd()) letGo(); }, { passive: true });
  box.addEventListener("keydown", (event) => { if (["ArrowUp", "PageUp", "Home"].includes(event.key)) letGo(); });
  box.addEventListener("scroll", () => {
    if (box.scrollTop < top - 1 && !atEnd()) following = false;  // also the scroll bar
    if (atEnd()) following = true;
    top = box.scrollTop;
    update();
  }, { passive: true });
  $("newest").addEventListener("click", toEnd);
}

export function toEnd() {
  following = true;
  log().scrollTop = log().scrollHeight;
  top = log().scrollTop;
  update();
}

// After something was drawn.
export const follow = () => { if (following) toEnd(); else update(); };
