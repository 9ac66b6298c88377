"use strict";
// Aliases; the audit and the config, which are asked for when somebody looks at them.

const AUDIT_PAGE = 50;
let auditOffset = 0;

const aliasColumns = [["Alias", "name"], ["Stands for", "name"], ["Where it is from", null], ["", "actions-cell"]];
const aliasTable = element("alias-table").appendChild(makeTable("", aliasColumns));
const auditColumns = [["When", null], ["What", "name"], ["Changes", "name"], ["By", "name"]];
const auditTable = element("audit-table").appendChild(makeTable("", auditColumns));

function showAliases({ aliases }) {
  element("no-aliases").hidden = aliases.length > 0;
  element("alias-table").hidden = !aliases.length;
  sync(aliasTable.tBodies[0], aliases, (alias) => alias.id, makeAlias, updateAlias);
}

function makeAlias(alias) {
  const row = makeRow(aliasColumns);
  twoLines(row.children[1]);
  const current = () => seen.aliases.find((each) => each.id === alias.id) ?? alias;
  const actions = [button("Edit", alias.alias_name, () => editAlias(current())), button("Delete", alias.alias_name, () => deleteAlias(alias), true)];
  row.children[3].append(make("div", { class: "actions" }, ...actions));
  return row;
}

function updateAlias(row, alias) {
  say(row.children[0], alias.alias_name);
  sayLines(row.children[1], alias.real_model_name, alias.problem);
  say(row.children[2], alias.declared ? "the config file" : `the API, ${moment(alias.created_at)}`);
  row.children[3].firstChild.hidden = alias.declared;
}

function prepareAlias(form, name, model, isNew) {
  const names = new Set(seen.servers.flatMap((server) => server.offered_models));
  element("model-names").replaceChildren(...[...names].sort().map((each) => make("option", { value: each })));
  form.elements.alias_name.value = name;
  form.elements.alias_name.closest(".field").hidden = !isNew;
  form.elements.real_model_name.value = model;
}

function newAlias() {
  openDialog("alias-dialog", {
    title: "New alias",
    submit: "Create alias",
    prepare: (form) => prepareAlias(form, "", "", true),
    async send({ elements: { alias_name: name, real_model_name: model } }) {
      const done = await session.call("POST", "aliases", { alias_name: name.value.trim(), real_model_name: model.value.trim() });
      changed(kept(`The alias ${name.value.trim()} is made.`, done));
    },
  });
}

function editAlias(alias) {
  openDialog("alias-dialog", {
    title: `Edit ${alias.alias_name}`,
    submit: "Save",
    prepare: (form) => prepareAlias(form, alias.alias_name, alias.real_model_name, false),
    async send(form) {
      const path = `aliases/${encodeURIComponent(alias.alias_name)}`;
      const done = await session.call("PATCH", path, { real_model_name: form.elements.real_model_name.value.trim() });
      changed(kept(`The alias ${alias.alias_name} is changed.`, done));
    },
  });
}

function deleteAlias(alias) {
  sure(`Delete the alias ${alias.alias_name}?`, "Requests that ask for it are refused from now on.", "Delete", async () => {
    await session.call("DELETE", `aliases/${encodeURIComponent(alias.alias_name)}`);
    changed(`The alias ${alias.alias_name} is deleted.`);
  });
}

async function showAudit() {
  const { entries, total } = await session.call("GET", `audit?limit=${AUDIT_PAGE}&offset=${auditOffset}`);
  element("no-audit").hidden = total > 0;
  element("audit-table").hidden = !total;
  element("newer").disabled = auditOffset === 0;
  element("older").disabled = auditOffset + entries.length >= total;
  say(element("audit-place"), total ? `${number(auditOffset + 1)}–${number(auditOffset + entries.length)} of ${number(total)}` : "");
  sync(auditTable.tBodies[0], entries, (entry) => entry.id, () => makeRow(auditColumns), updateEntry);
}

function updateEntry(row, entry) {
  const texts = [moment(entry.at), `${entry.kind} ${entry.name}: ${entry.action}`, Object.entries(entry.detail).map(difference).join("; ") || "–", entry.actor];
  texts.forEach((text, place) => say(row.children[place], text));
}

function difference([field, { old, new: now }]) {
  if (now === null) return `${field}: ${plain(old)} removed`;
  return old === null ? `${field}: ${plain(now)}` : `${field}: ${plain(old)} → ${plain(now)}`;
}

function plain(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

async function turnAudit(by) {
  auditOffset = Math.max(auditOffset + by, 0);
  await act(showAudit);
}

async function showConfig() {
  const { config, problems } = await session.call("GET", "config");
  say(element("config-text"), JSON.stringify(config, null, 2));
  sayNotes(problems.map((problem) => `Made by the API and not in use: ${problem}`));
}

function sayNotes(notes) {
  element("config-notes").replaceChildren(...notes.map((note) => make("li", {}, note)));
}

/** `report`: what became of reading the file the last time. */
function showConfigState(report) {
  const text = report.ok ? "The file is in use as it was read on" : "The file is wrong; what it said before stays in use. It was read on";
  say(element("config-state"), `${text} ${moment(report.at)}.`);
  say(element("config-alert"), report.ok ? "" : `The config file is wrong and not in use: ${report.problem}`);
}

async function reload() {
  await act(async () => {
    const report = await session.call("POST", "config/reload").catch((problem) => {
      if (problem.said?.ok === false) return problem.said;
      throw problem;
    });
    await gate.refresh();
    await showConfig();
    if (!report.ok) return "The file is wrong: nothing has changed.";
    sayNotes([
      report.changed.length ? `Changed: ${report.changed.join(", ")}` : "The file says what is in use already.",
      ...report.needs_restart.map((name) => `${name} changes with a restart only.`),
    ]);
    return "The config is read again.";
  });
}

element("new-alias").addEventListener("click", newAlias);
element("newer").addEventListener("click", () => turnAudit(-AUDIT_PAGE));
element("older").addEventListener("click", () => turnAudit(AUDIT_PAGE));
element("reload").addEventListener("click", reload);
