"use strict";
// The way in and out: a form that takes the key, and everything marked data-in, which is seen only with one.

class Gate {
  /** `load` asks the server and throws Problems, `show` shows what it said, `clear` forgets all of it. */
  constructor({ load, show, clear }) {
    Object.assign(this, { load, show, clear });
    this.input = element("key");
    element("enter").addEventListener("submit", (event) => this.enter(event));
    element("leave").addEventListener("click", () => this.leave());
    addEventListener("pagehide", () => this.leave()); // a page that comes back from the browser's history is empty
  }

  async enter(event) {
    event.preventDefault();
    this.reject("");
    if (!session.open(this.input.value)) return this.reject("This can't be a key: no key holds spaces or such letters.");
    const button = event.submitter ?? element("enter").querySelector("button");
    button.disabled = true;
    try {
      await this.load();
    } catch (problem) {
      session.close();
      if (problem.status !== null) this.reject(problem.message);
      return;
    } finally {
      button.disabled = false;
    }
    this.input.value = "";
    this.toggle(true);
    this.show();
    document.querySelector("[data-first]").focus();
  }

  reject(message) {
    say(element("gate-alert"), message);
    if (!message) return this.input.removeAttribute("aria-invalid");
    this.input.setAttribute("aria-invalid", "true");
    this.input.focus();
  }

  /** Whether it worked. A key that is not good any more is the end; all else is told, and what was shown stays. */
  async refresh() {
    try {
      await this.load();
    } catch (problem) {
      if (problem.status === 401 || problem.status === 403) this.leave(problem.message);
      else if (problem.status !== null) say(element("alert"), problem.message);
      return false;
    }
    say(element("alert"), "");
    this.show();
    return true;
  }

  /** `message`: why, when nobody asked for it. */
  leave(message = "") {
    if (!session.isOpen) return;
    session.close();
    this.toggle(false);
    this.clear();
    this.input.value = "";
    say(element("alert"), "");
    say(element("news"), message ? "" : "Signed out.");
    this.reject(message);
    this.input.focus();
  }

  toggle(isIn) {
    for (const part of document.querySelectorAll("[data-in]")) part.hidden = !isIn;
    element("gate").hidden = isIn;
  }
}
