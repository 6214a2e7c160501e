// Which answers are being written, in any tab. The tab that writes one holds a lock of the browser, which ends with the
// tab whatever happens to it. Without https there are no locks: then an answer stored within the last seconds counts.

const NAME = "nanochat/answer/", SILENT = 10_000;  // ms
let held = null;  // names of all tabs' locks, null where there are none

// Hold the lock of an answer; returns a function that ends it.
export function hold(id) {
  let release;
  const ended = new Promise((resolve) => { release = resolve; });
  navigator.locks?.request(NAME + id, () => ended).catch(() => {});
  return release;
}

export async function lookElsewhere() {
  if (navigator.locks) held = new Set((await navigator.locks.query()).held.map((lock) => lock.name));
}

// Whether the answer is being written, here or elsewhere, as of the last look.
export const isWritten = (message) => message.role === "assistant" && message.end === undefined
  && (message.writing || (held ? held.has(NAME + message.id) : Math.abs(Date.now() - message.changed) < SILENT));
