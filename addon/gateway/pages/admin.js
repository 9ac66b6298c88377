"use strict";
// /admin/: asks for the admin key, shows what GET /admin/overview says, again every few seconds, and lets it be changed.

const REFRESH_MS = 3000;
const NEWS_MS = 10_000;
const VIEWS = { overview: null, keys: null, teams: null, aliases: null, audit: showAudit, config: showConfig };

let seen = null; // the last overview
let fading = null; // the timer that takes news away

async function load() {
  seen = await session.call("GET", "overview");
}

function show() {
  showOverview(seen);
  showKeys(seen);
  showTeams(seen);
  showAliases(seen);
  showConfigState(seen.config);
  say(element("fresh"), `as of ${CLOCK.format(new Date(seen.at))}`);
}

function clear() {
  seen = null;
  auditOffset = 0;
  closeDialogs();
  for (const body of document.querySelectorAll("tbody")) body.replaceChildren();
  for (const id of ["tiles", "shared-list", "config-notes"]) element(id).replaceChildren();
  for (const id of ["fresh", "config-text", "config-state", "config-alert", "audit-place", "check-text"]) say(element(id), "");
  element("find").value = "";
  view("overview");
  element("overview").hidden = true;
}

function view(name) {
  for (const each of Object.keys(VIEWS)) element(each).hidden = each !== name;
  for (const button of document.querySelectorAll("[data-view]")) {
    if (button.dataset.view === name) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
}

function viewed() {
  return document.querySelector("[data-view][aria-current]").dataset.view;
}

/** Do something that may fail; what it returns is news. */
async function act(work) {
  try {
    const news = await work();
    say(element("alert"), "");
    if (news) changed(news);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === 401) gate.leave(problem.message);
    else if (problem.status !== null) say(element("alert"), problem.message);
  }
}

/** `done`: an answer that may warn of what will not be as one may expect. */
function noted(news, done) {
  return done.warning ? `${news} But ${done.warning}.` : news;
}

/** `done`: an answer that may warn that what was made is not in use. */
function kept(news, done) {
  return done.warning ? `${news} It is kept, but not in use: ${done.warning}` : news;
}

/** Something is different now: say so for a while, and show it. */
function changed(news) {
  say(element("news"), news);
  clearTimeout(fading);
  fading = setTimeout(() => say(element("news"), ""), NEWS_MS);
  gate.refresh();
  if (VIEWS[viewed()] && viewed() !== "config") act(VIEWS[viewed()]);
}

const gate = new Gate({ load, show, clear });
for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => {
    view(button.dataset.view);
    if (VIEWS[button.dataset.view]) act(VIEWS[button.dataset.view]);
  });
}

let asking = false;
setInterval(async () => {
  if (!session.isOpen || !seen || asking || document.hidden) return;
  asking = true;
  try {
    await gate.refresh();
  } finally {
    asking = false;
  }
}, REFRESH_MS);
