"use strict";
// What can be done with servers: those that the config file declares are checked only, the others changed as well.

function serverButtons(server) {
  const current = () => seen.servers.find((each) => each.id === server.id) ?? server;
  return [
    button("Edit", server.name, () => editServer(current())),
    button("Deactivate", server.name, () => toggleServer(current())),
    button("Remove", server.name, () => deleteServer(current()), true),
  ];
}

function updateServerButtons(actions, server) {
  const [, edit, toggle, remove] = actions.children;
  for (const each of [edit, toggle, remove]) each.hidden = server.declared;
  say(toggle, server.active ? "Deactivate" : "Activate");
  toggle.setAttribute("aria-label", `${toggle.textContent}: ${server.name}`);
}

const BLANK_SERVER = { name: "", url: "", api_key: "", models: null, slots: null, weight: 1 };

function prepareServer(form, server, isNew) {
  form.elements.name.value = server.name;
  form.elements.name.closest(".field").hidden = !isNew;
  form.elements.url.value = server.url;
  form.elements.models.value = (server.models ?? []).join("\n");
  form.elements.slots.value = server.slots ?? "";
  form.elements.weight.value = server.weight;
  say(element("server-key-hint"), server.api_key ? `Empty: it stays ${server.api_key}` : "Empty: none");
}

function readServer(form) {
  const models = form.elements.models.value.split("\n").map((line) => line.trim()).filter(Boolean);
  return {
    url: form.elements.url.value.trim(),
    models: models.length ? models : null,
    slots: form.elements.slots.value === "" ? null : Number(form.elements.slots.value),
    weight: Number(form.elements.weight.value),
    ...(form.elements.api_key.value ? { api_key: form.elements.api_key.value.trim() } : {}),
  };
}

function newServer() {
  openDialog("server-dialog", {
    title: "New server",
    submit: "Add server",
    prepare: (form) => prepareServer(form, BLANK_SERVER, true),
    async send(form) {
      const name = form.elements.name.value.trim();
      const done = await session.call("POST", "servers", { name, ...readServer(form) });
      changed(kept(`The server ${name} is added.`, done));
    },
  });
}

function editServer(server) {
  let before;
  openDialog("server-dialog", {
    title: `Edit ${server.name}`,
    submit: "Save",
    prepare(form) {
      prepareServer(form, server, false);
      before = readServer(form);
    },
    async send(form) {
      const changes = changesOf(before, readServer(form));
      const done = Object.keys(changes).length ? await session.call("PATCH", `servers/${server.id}`, changes) : {};
      changed(kept(`The server ${server.name} is changed.`, done));
    },
  });
}

async function toggleServer(server) {
  await act(async () => {
    const done = await session.call("PATCH", `servers/${server.id}`, { active: !server.active });
    return kept(`The server ${server.name} is ${server.active ? "deactivated" : "activated"}.`, done);
  });
}

function deleteServer(server) {
  const text = "It gets no new requests from now on; those that run on it end in peace. Its past use stays in the books.";
  sure(`Remove the server ${server.name}?`, text, "Remove", async () => {
    changed(kept(`The server ${server.name} is removed.`, await session.call("DELETE", `servers/${server.id}`)));
  });
}

const checkColumns = [["Model", "name"], ["Answer", null], ["Time", "number"]];
const checkTable = element("check-table").appendChild(makeTable("", checkColumns));

async function checkServer(server) {
  openDialog("check-dialog", { title: `Live check of ${server.name}` });
  checkTable.hidden = true;
  say(element("check-text"), "Each model is asked for a token …");
  try {
    const check = await session.call("POST", `servers/${server.id}/check`);
    const listed = check.problem ? `It ${check.problem}` : `It listed its models in ${number(check.latency_ms)} ms.`;
    say(element("check-text"), check.ok ? `All is well. ${listed}` : `Something is wrong. ${listed}`);
    checkTable.hidden = !check.models.length;
    sync(checkTable.tBodies[0], check.models, (each) => each.model, makeChecked, updateChecked);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === null) return;
    say(element("check-text"), "");
    say(element("check-dialog").querySelector(".alert"), problem.message);
  }
}

function makeChecked() {
  const row = makeRow(checkColumns);
  makeState(row.children[1]);
  return row;
}

function updateChecked(row, check) {
  say(row.children[0], check.model);
  sayLines(row.children[1], check.ok ? "answers" : "fails", check.problem);
  setClass(row.children[1].firstChild.firstChild, `state ${check.ok ? "good" : "bad"}`);
  say(row.children[2], `${number(check.latency_ms)} ms`);
}

element("new-server").addEventListener("click", newServer);
