"use strict";
// The gateway at a glance: its servers, what runs on them, and the limits that all share.

const STATE_CLASSES = { up: "good", active: "good", loading: "warn", paused: "warn", ejected: "warn", down: "bad", disabled: "bad", expired: "bad" };

const serverColumns = [["Server", "name"], ["State", null], ["Load", null], ["Models", "name"], ["", "actions-cell"]];
const serverTable = element("servers").appendChild(makeTable("", serverColumns));
const runningColumns = [["Key", "name"], ["Running for", "number"], ["Model", "name"], ["Server", "name"], ["Endpoint", "name"], ["Attempts", "number"]];
const runningTable = element("running").appendChild(makeTable("", runningColumns));

/** A line, and a smaller one below it. */
function twoLines(cell) {
  cell.append(make("span", { class: "lines" }, make("span"), make("span", { class: "small quiet" })));
}

function sayLines(cell, first, second) {
  const [one, two] = cell.firstChild.children;
  say(one, first);
  say(two, second ?? "");
  two.hidden = !second;
}

function makeState(cell) {
  cell.append(make("span", { class: "lines" }, make("span", { class: "state" }), make("span", { class: "small quiet" })));
}

function sayState(cell, state, second) {
  sayLines(cell, state.replaceAll("_", " "), second);
  setClass(cell.firstChild.firstChild, `state ${STATE_CLASSES[state] ?? ""}`.trim());
}

function button(text, what, act, isHarm = false) {
  return make("button", { type: "button", class: isHarm ? "harm" : null, "aria-label": `${text}: ${what}`, onclick: act }, text);
}

function showOverview(seen) {
  showGatewayTiles(seen);
  sync(serverTable.tBodies[0], seen.servers, (server) => server.id, makeServer, updateServer);
  element("no-running").hidden = seen.running.length > 0;
  element("running").hidden = !seen.running.length;
  sync(runningTable.tBodies[0], seen.running, (request) => request.id, () => makeRow(runningColumns), updateRunning);
  const shared = usesOf(seen, (use) => use.scope === "all" || use.scope === "model");
  element("shared").hidden = !shared.length;
  sync(element("shared-list"), shared, useKey, makeLimit, (item, use) => {
    updateLimit(item, use, scopeName(use), amountOf(use, seen.currency));
    say(item.lastChild, resetText(use, 0));
  });
}

function usesOf(seen, isWanted) {
  return [...seen.limits, ...seen.budgets].filter(isWanted);
}

function useKey(use) {
  return [use.scope, use.name, use.limit, use.per, use.unit].join(" ");
}

function amountOf(use, currency) {
  return use.unit === "money" ? (value) => money(value, currency) : number;
}

function showGatewayTiles(seen) {
  const sum = (of) => seen.today.reduce((total, each) => total + of(each), 0);
  const inUse = seen.servers.filter((server) => server.state !== null);
  const up = inUse.filter((server) => server.state === "up").length;
  const ids = new Set(seen.keys.map((key) => key.id));
  const usedToday = seen.today.filter((each) => ids.has(each.key_id)).length;
  const others = seen.today.filter((each) => each.key_id === null).length;
  const usedText = `${number(usedToday)} of ${number(seen.keys.length)} keys used today`;
  const cost = sum((each) => each.cost);
  const tokens = sum((each) => each.prompt_tokens + each.completion_tokens);
  const tiles = [
    ["Servers up", `${up} of ${inUse.length}`, up < inUse.length ? "not all are up" : "all are up"],
    ["Running", number(seen.running.length), `${number(seen.waiting)} waiting for a server`],
    ["Requests today", number(sum((each) => each.requests)), others ? `${usedText}, ${number(others)} of other sources` : usedText],
    ["Tokens today", short(tokens), cost > 0 ? `${money(cost, seen.currency)}` : "prompts and answers"],
  ];
  const create = () => make("div", { class: "tile" }, make("dt"), make("dd"), make("dd"));
  sync(element("tiles"), tiles, ([name]) => name, create, (tile, texts) => texts.forEach((text, i) => say(tile.children[i], text)));
}

function makeServer(server) {
  const row = makeRow(serverColumns);
  const [name, state, load, models, actions] = row.children;
  twoLines(name);
  makeState(state);
  load.append(make("div", { class: "load" }, make("span", { class: "number" }), makeBar()));
  models.append(make("span"));
  actions.append(make("div", { class: "actions" }, button("Check", server.name, () => checkServer(server)), ...serverButtons(server)));
  return row;
}

function updateServer(row, server) {
  const [name, state, loadCell, models, actions] = row.children;
  sayLines(name, server.name, server.declared ? `${server.url} · in the config file` : server.url);
  updateServerButtons(actions.firstChild, server);
  sayState(state, server.state ?? (server.active ? "not in use" : "inactive"), server.problem);
  const [text, bar] = loadCell.firstChild.children;
  const slots = server.slots ? `${number(server.running)} of ${number(server.slots)} slots` : `${number(server.running)} running`;
  say(text, server.waiting ? `${slots} · ${number(server.waiting)} waiting` : slots);
  bar.hidden = !server.slots;
  if (server.slots) updateBar(bar, { allowed: server.slots, used: server.running, held: 0 }, `Slots of ${server.name}`, slots);
  setClass(bar, "bar"); // to be full is no fault of a server
  say(models.firstChild, server.offered_models.join(", ") || "–");
}

function updateRunning(row, request) {
  const asked = request.model && request.model !== request.served_model ? ` (as ${request.model})` : "";
  const texts = [
    request.key_name ?? "–",
    span(request.running_s),
    request.served_model ? `${request.served_model}${asked}` : (request.model ?? "–"),
    request.server ?? "waits for one",
    request.endpoint,
    number(request.attempts ?? 0),
  ];
  texts.forEach((text, place) => say(row.children[place], text));
}
