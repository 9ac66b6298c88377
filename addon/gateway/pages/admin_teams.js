"use strict";
// Teams: limits that their keys share.

const teamColumns = [["Team", "name"], ["Keys", "name"], ["Limits", "uses"], ["", "actions-cell"]];
const teamTable = element("team-table").appendChild(makeTable("", teamColumns));
const teamLimits = new LimitFields(element("team-dialog").querySelector("[data-limits]"), "team");

function showTeams(seen) {
  element("no-teams").hidden = seen.teams.length > 0;
  element("team-table").hidden = !seen.teams.length;
  sync(teamTable.tBodies[0], seen.teams, (team) => team.name, makeTeam, (row, team) => updateTeam(row, team, seen));
}

function makeTeam(team) {
  const row = makeRow(teamColumns);
  const [name, , uses, actions] = row.children;
  twoLines(name);
  uses.append(make("ul", { class: "mini" }));
  const current = () => seen.teams.find((each) => each.name === team.name) ?? team;
  actions.append(
    make(
      "div",
      { class: "actions" },
      button("Limits", team.name, () => editTeam(current())),
      button("Delete", team.name, () => deleteTeam(current()), true),
    ),
  );
  return row;
}

function updateTeam(row, team, seen) {
  const [name, keys, uses, actions] = row.children;
  sayLines(name, team.name, team.declared ? "in the config file" : null);
  say(keys, team.keys.join(", ") || "–");
  showUses(uses.firstChild, usesOf(seen, (use) => use.scope === "team" && use.name === team.name), seen.currency);
  actions.firstChild.hidden = team.declared;
}

function newTeam() {
  openDialog("team-dialog", {
    title: "New team",
    submit: "Create team",
    prepare: (form) => prepareTeam(form, { name: "", limits: {} }, true),
    async send(form) {
      const made = await session.call("POST", "teams", { name: form.elements.name.value.trim(), limits: teamLimits.read() });
      changed(noted(`The team ${made.name} is made.`, made));
    },
  });
}

function editTeam(team) {
  openDialog("team-dialog", {
    title: `Limits of ${team.name}`,
    submit: "Save",
    prepare: (form) => prepareTeam(form, team, false),
    async send() {
      const done = await session.call("PATCH", `teams/${encodeURIComponent(team.name)}`, { limits: teamLimits.read() });
      changed(noted(`The limits of ${team.name} are changed.`, done));
    },
  });
}

function prepareTeam(form, team, isNew) {
  form.elements.name.value = team.name;
  form.elements.name.closest(".field").hidden = !isNew;
  teamLimits.set(team.limits);
}

function deleteTeam(team) {
  sure(`Delete the team ${team.name}?`, "Only a team without keys can be deleted. This can't be undone.", "Delete", async () => {
    await session.call("DELETE", `teams/${encodeURIComponent(team.name)}`);
    changed(`The team ${team.name} is deleted.`);
  });
}

element("new-team").addEventListener("click", newTeam);
