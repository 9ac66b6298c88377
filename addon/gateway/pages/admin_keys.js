"use strict";
// Keys: their use against their limits, and all that can be done with them.

const keyColumns = [["Key", "name"], ["State", null], ["Today", "number"], ["Limits", "uses"], ["Expires", null], ["", "actions-cell"]];
const keyTable = element("key-table").appendChild(makeTable("", keyColumns));
const keyLimits = new LimitFields(element("key-dialog").querySelector("[data-limits]"), "key");

const LIST_FIELDS = ["models", "endpoints", "networks"];
const TEXT_FIELDS = ["expires_at", "not_before"];

function showKeys(seen) {
  const wanted = element("find").value.trim().toLowerCase();
  const keys = seen.keys.filter((key) => `${key.name} ${key.team ?? ""}`.toLowerCase().includes(wanted));
  const today = new Map(seen.today.map((use) => [use.key_id, use]));
  element("no-keys").hidden = keys.length > 0;
  element("key-table").hidden = !keys.length;
  sync(keyTable.tBodies[0], keys, (key) => key.id, makeKey, (row, key) => updateKey(row, key, today.get(key.id), seen));
  showOthers(seen, wanted);
}

function makeKey(key) {
  const row = makeRow(keyColumns);
  const [name, state, today, uses, , actions] = row.children;
  twoLines(name);
  makeState(state);
  twoLines(today);
  uses.append(make("ul", { class: "mini" }));
  const current = () => seen.keys.find((each) => each.id === key.id) ?? key;
  actions.append(
    make(
      "div",
      { class: "actions" },
      button("Edit", key.name, () => editKey(current())),
      button("Rotate", key.name, () => rotateKey(current())),
      button("Disable", key.name, () => toggleKey(current())),
      button("Delete", key.name, () => deleteKey(current()), true),
    ),
  );
  return row;
}

function updateKey(row, key, today, seen) {
  const [name, state, todayCell, uses, expires, actions] = row.children;
  sayLines(name, key.name, key.team ? `${key.hint} · team ${key.team}` : key.hint);
  sayState(state, key.state, key.old_until ? `old key until ${moment(key.old_until)}` : null);
  sayToday(todayCell, today, seen.currency);
  showUses(uses.firstChild, usesOf(seen, (use) => use.scope === "key" && use.name === key.name), seen.currency);
  say(expires, key.expires_at ? moment(key.expires_at) : "never");
  const toggle = actions.firstChild.children[2];
  say(toggle, key.disabled ? "Enable" : "Disable");
  toggle.setAttribute("aria-label", `${toggle.textContent}: ${key.name}`);
}

/** `today`: an entry of the overview's; undefined: nothing was used. */
function sayToday(cell, today, currency) {
  const tokens = today ? today.prompt_tokens + today.completion_tokens : 0;
  const cost = today?.cost ? ` · ${money(today.cost, currency)}` : "";
  sayLines(cell, `${short(tokens)} tokens`, `${number(today?.requests ?? 0)} requests${cost}`);
}

/** Limits in a table's cell: a line and a thin bar each. */
function showUses(list, uses, currency, none = "no limits") {
  const items = uses.length ? uses : [null];
  sync(list, items, (use) => (use ? useKey(use) : "none"), makeUse, (item, use) => {
    if (!use) return say(item.firstChild, none);
    const amount = use.unit === "money" ? amountOf(use, currency) : short;
    const text = `${limitName(use)}: ${amount(use.used + use.held)} of ${amount(use.allowed)}`;
    say(item.firstChild, text);
    updateBar(item.lastChild, use, limitName(use), text);
  });
}

function makeUse(use) {
  return use ? make("li", {}, make("span", { class: "small number" }), makeBar()) : make("li", {}, make("span", { class: "small quiet" }));
}

function prepareKey(form, key) {
  const teams = seen.teams.map((team) => team.name);
  if (key.team && !teams.includes(key.team)) teams.push(key.team);
  form.elements.team.replaceChildren(make("option", { value: "" }, "none"), ...teams.map((name) => make("option", { value: name }, name)));
  form.elements.name.value = key.name;
  form.elements.team.value = key.team ?? "";
  for (const name of LIST_FIELDS) form.elements[name].value = key[name].join("\n");
  for (const name of TEXT_FIELDS) form.elements[name].value = key[name] ?? "";
  form.elements.priority.value = key.priority;
  form.elements.weight.value = key.weight;
  form.querySelector("details").open = false;
  keyLimits.set(key.limits);
}

function readKey(form) {
  const lines = (name) => form.elements[name].value.split("\n").map((line) => line.trim()).filter(Boolean);
  return {
    name: form.elements.name.value.trim(),
    team: form.elements.team.value || null,
    ...Object.fromEntries(LIST_FIELDS.map((name) => [name, lines(name)])),
    ...Object.fromEntries(TEXT_FIELDS.map((name) => [name, form.elements[name].value.trim() || null])),
    priority: form.elements.priority.value,
    weight: Number(form.elements.weight.value),
    limits: keyLimits.read(),
  };
}

const BLANK = { name: "", team: null, models: [], endpoints: [], networks: [], expires_at: null, not_before: null, priority: "normal", weight: 1, limits: {} };

/** What of `after` differs. */
function changesOf(before, after) {
  return Object.fromEntries(Object.entries(after).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(before[name])));
}

function newKey() {
  openDialog("key-dialog", {
    title: "New key",
    submit: "Create key",
    prepare: (form) => prepareKey(form, BLANK),
    async send(form) {
      const made = await session.call("POST", "keys", { name: form.elements.name.value.trim(), ...changesOf(BLANK, readKey(form)) });
      tellSecret(`The key of ${made.name}`, noted("It is shown only now: nobody can read it back later.", made), made.key);
      changed(noted(`The key ${made.name} is made.`, made));
    },
  });
}

function editKey(key) {
  let before;
  openDialog("key-dialog", {
    title: `Edit ${key.name}`,
    submit: "Save",
    prepare(form) {
      prepareKey(form, key);
      before = readKey(form);
    },
    async send(form) {
      const changes = changesOf(before, readKey(form));
      const done = Object.keys(changes).length ? await session.call("PATCH", `keys/${key.id}`, changes) : {};
      changed(noted(`The key ${key.name} is changed.`, done));
    },
  });
}

function rotateKey(key) {
  openDialog("rotate-dialog", {
    title: `Rotate ${key.name}`,
    async send(form) {
      const rotated = await session.call("POST", `keys/${key.id}/rotate`, { overlap_s: Number(form.elements.overlap_s.value) });
      const end = rotated.old_until ? `The old key holds until ${moment(rotated.old_until)}.` : "The old key has ended.";
      tellSecret(`The new key of ${rotated.name}`, `It is shown only now: nobody can read it back later. ${end}`, rotated.key);
      changed(`The key ${rotated.name} is rotated.`);
    },
  });
}

async function toggleKey(key) {
  await act(async () => {
    await session.call("PATCH", `keys/${key.id}/toggle`, { active: key.disabled });
    return `The key ${key.name} is ${key.disabled ? "enabled" : "disabled"}.`;
  });
}

function deleteKey(key) {
  const text = `Whoever uses the key ${key.hint} is refused from now on. This can't be undone. Its past use stays in the books.`;
  sure(`Delete the key ${key.name}?`, text, "Delete", async () => {
    await session.call("DELETE", `keys/${key.id}`);
    changed(`The key ${key.name} is deleted.`);
  });
}

element("new-key").addEventListener("click", newKey);
element("find").addEventListener("input", () => seen && showKeys(seen));
