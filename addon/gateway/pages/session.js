"use strict";
// The key lives in this closure and nowhere else: it is in no URL, no storage, no form, and gone with the page. It is
// sent to the page's own origin alone.

/** An answer that is none. `status` 0: the server could not be reached; null: nobody waits for the answer any more. */
class Problem extends Error {
  constructor(status, message, param = null, said = null) {
    super(message);
    this.status = status;
    this.param = param; // the field at fault
    this.said = said; // the answer's JSON
  }
}

const session = (() => {
  const PATIENCE_MS = 30_000;
  let key = null;
  let ended = new AbortController();

  /** `path` is relative to the page. Returns what the JSON says, or throws a Problem. */
  async function call(method, path, body) {
    const end = ended.signal;
    let answer, text;
    if (key === null) throw new Problem(null, "Signed out.");
    try {
      answer = await fetch(path, {
        method,
        headers: { Authorization: `Bearer ${key}`, ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
        body: body === undefined ? undefined : JSON.stringify(body),
        cache: "no-store",
        credentials: "omit",
        redirect: "error",
        referrerPolicy: "no-referrer",
        signal: AbortSignal.any([end, AbortSignal.timeout(PATIENCE_MS)]),
      });
      text = await answer.text();
    } catch {
      if (end.aborted) throw new Problem(null, "Signed out.");
      throw new Problem(0, "The server can't be reached. Check the connection and try again.");
    }
    const said = parsed(text);
    if (answer.ok) return said;
    const error = said?.error ?? {};
    const wait = answer.headers.get("retry-after");
    const reason = typeof error.message === "string" ? error.message : `The server answered ${answer.status}.`;
    throw new Problem(answer.status, wait ? `${reason} Try again in ${wait} s.` : reason, error.param ?? null, said);
  }

  function parsed(text) {
    try {
      return JSON.parse(text);
    } catch {
      return null;
    }
  }

  return {
    call,
    get isOpen() {
      return key !== null;
    },
    /** Returns false for what can't be a key. */
    open(text) {
      const given = text.trim();
      if (!/^[\x21-\x7e]+$/.test(given)) return false;
      ended = new AbortController();
      key = given;
      return true;
    },
    /** Forget the key, and what was asked with it. */
    close() {
      key = null;
      ended.abort();
    },
  };
})();
