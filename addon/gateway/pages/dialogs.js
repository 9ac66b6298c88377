"use strict";
// Dialogs with a form: what is typed in one is not touched by what the page shows behind it.

let opener = null; // what had the focus before the first dialog

/** Opens a dialog. `send(form)` does what it is for, and may throw a Problem, which is told beside its field. */
function openDialog(id, { title, submit, send, prepare }) {
  const dialog = element(id);
  const form = dialog.querySelector("form");
  const button = form.querySelector("[type=submit]");
  form.reset();
  complain(form, null);
  if (title) say(form.querySelector("h2"), title);
  if (submit) say(button, submit);
  prepare?.(form);
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (!send) return dialog.close();
    complain(form, null);
    const wrong = [...form.elements].find((field) => field.validity && !field.validity.valid);
    if (wrong) return complain(form, new Problem(400, wrong.validationMessage, wrong.name));
    button.disabled = true;
    try {
      await send(form);
      dialog.close();
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      if (problem.status !== null) complain(form, problem);
    } finally {
      button.disabled = false;
    }
  };
  for (const cancel of form.querySelectorAll("[data-cancel]")) cancel.onclick = () => dialog.close();
  if (!document.querySelector("dialog[open]")) opener = document.activeElement;
  dialog.onclose = focusOpener;
  dialog.showModal();
}

/** Where a dialog was opened from; when that is gone with what the dialog did, the section's button. */
function focusOpener() {
  if (document.querySelector("dialog[open]")) return;
  const place = opener?.isConnected ? opener : document.querySelector("[data-view][aria-current]");
  place.focus();
}

function closeDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    if (dialog.open) dialog.close();
    dialog.querySelector("form").reset();
  }
}

/** What is wrong, and at which field: `problem.param` is its name, or begins with it. */
function complain(form, problem) {
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  say(form.querySelector(".alert"), problem?.message ?? "");
  if (!problem?.param) return;
  const named = [...form.elements].filter((field) => field.name && isOf(problem.param, field.name));
  const field = named.sort((a, b) => b.name.length - a.name.length)[0];
  if (!field) return;
  const details = field.closest("details");
  if (details) details.open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

function isOf(param, name) {
  return param === name || (param.startsWith(name) && "[.".includes(param[name.length]));
}

function sure(title, text, submit, send) {
  openDialog("sure-dialog", { title, submit, send, prepare: () => say(element("sure-text"), text) });
}

/** A key that is told once. It leaves the page with the dialog. */
function tellSecret(title, text, secret) {
  const input = element("secret");
  openDialog("secret-dialog", { title });
  say(element("secret-text"), text);
  say(element("copied"), "");
  input.value = secret;
  element("secret-dialog").addEventListener("close", () => (input.value = ""), { once: true });
}

async function copySecret() {
  const input = element("secret");
  try {
    await navigator.clipboard.writeText(input.value); // only over HTTPS and on localhost
  } catch {
    input.select();
    document.execCommand("copy");
  }
  say(element("copied"), "Copied.");
}

element("copy").addEventListener("click", copySecret);

/** Fields for limits, within a form. `set` shows what there is, `read` gives what is typed. */
class LimitFields {
  static NAMES = [
    ["rpm", "Requests per minute", "1"],
    ["tpm", "Tokens per minute", "1"],
    ["concurrency", "Requests at once", "1"],
    ["rps", "Requests per second", "any"],
    ["burst", "Burst of requests", "1"],
  ];

  constructor(holder, prefix) {
    const fields = LimitFields.NAMES.map(([name, label, step]) => {
      const input = make("input", { id: `${prefix}-${name}`, name: `limits.${name}`, type: "number", min: "0", step });
      return make("div", { class: "field" }, make("label", { for: input.id }, label), input);
    });
    this.inputs = fields.map((field) => field.lastChild);
    this.budgets = make("div", { class: "budgets" });
    const add = make("button", { type: "button", onclick: () => this.add({}).querySelector("select").focus() }, "Add a budget");
    holder.replaceChildren(
      make(
        "fieldset",
        { class: "group" },
        make("legend", {}, "Limits"),
        make("p", { class: "hint" }, "Empty: no limit of its own. 0: nothing is allowed."),
        make("div", { class: "triple" }, ...fields),
        this.budgets,
        make("div", { class: "actions" }, add),
      ),
    );
  }

  set(limits) {
    LimitFields.NAMES.forEach(([name], place) => (this.inputs[place].value = limits[name] ?? ""));
    this.budgets.replaceChildren();
    for (const budget of limits.budgets ?? []) this.add(budget);
  }

  add({ per = "month", tokens = null, money = null }) {
    const place = this.budgets.children.length;
    const options = (names, chosen) => names.map(([value, text]) => make("option", { value, selected: value === chosen }, text));
    const pers = Object.entries(PERIOD_NAMES);
    const unit = money === null ? "tokens" : "money";
    const row = make(
      "div",
      { class: "budget", role: "group", "aria-label": `Budget ${place + 1}` },
      make("select", { "aria-label": "Period" }, ...options(pers, per)),
      make("select", { "aria-label": "Unit" }, ...options([["tokens", "tokens"], ["money", "money"]], unit)),
      make("input", { type: "number", min: "0", step: "any", required: true, "aria-label": "Amount" }),
      make("button", { type: "button", "aria-label": "Remove this budget", onclick: () => this.remove(row) }, "Remove"),
    );
    row.children[2].value = tokens ?? money ?? "";
    this.budgets.append(row);
    this.number();
    return row;
  }

  remove(row) {
    const next = row.nextSibling ?? row.previousSibling;
    row.remove();
    this.number();
    (next?.querySelector("button") ?? this.inputs[0]).focus();
  }

  /** Fields are named as the API names them when it complains. */
  number() {
    [...this.budgets.children].forEach((row, place) => {
      row.setAttribute("aria-label", `Budget ${place + 1}`);
      ["per", "unit", "amount"].forEach((name, i) => (row.children[i].name = `limits.budgets[${place}]${name === "amount" ? "" : `.${name}`}`));
    });
  }

  /** All of them: null takes a limit away. */
  read() {
    const given = this.inputs.map((input, place) => [LimitFields.NAMES[place][0], input.value === "" ? null : Number(input.value)]);
    const budgets = [...this.budgets.children].map(({ children: [per, unit, amount] }) => ({ per: per.value, [unit.value]: Number(amount.value) }));
    return { ...Object.fromEntries(given), budgets };
  }
}
