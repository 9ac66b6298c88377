"use strict";
// Values as people read them. Days are UTC, as in the books.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const UP_TO_TWO = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });
const LONG_DAY = new Intl.DateTimeFormat("en-GB", { weekday: "long", day: "numeric", month: "long", timeZone: "UTC" });
const MOMENT = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short", timeZone: "UTC" });
const CLOCK = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const DAY_MS = 86_400_000;

function number(value) {
  return (Number.isInteger(value) ? WHOLE : UP_TO_TWO).format(value);
}

function short(value) {
  return SHORT.format(value);
}

/** Small amounts keep the digits that matter. A currency that is none of ISO 4217's stands behind the amount. */
function money(value, currency) {
  const digits = !value || Math.abs(value) >= 0.1 ? 2 : Math.abs(value) >= 0.001 ? 4 : 6;
  const style = { minimumFractionDigits: 2, maximumFractionDigits: digits };
  if (!/^[A-Z]{3}$/.test(currency)) return `${new Intl.NumberFormat("en", style).format(value)} ${currency}`;
  return new Intl.NumberFormat("en", { ...style, style: "currency", currency }).format(value);
}

function percent(share) {
  return `${UP_TO_TWO.format(Math.round(share * 1000) / 10)} %`;
}

/** 41 s, 12 min, 5 h 20 min, 9 days */
function span(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  const hours = Math.floor(seconds / 3600);
  if (hours < 48) return `${hours} h ${Math.round((seconds % 3600) / 60)} min`;
  return `${Math.round(seconds / 86400)} days`;
}

function dayLabel(day) {
  return DAY.format(new Date(`${day}T00:00:00Z`));
}

function longDay(day) {
  return LONG_DAY.format(new Date(`${day}T00:00:00Z`));
}

function moment(iso) {
  return `${MOMENT.format(new Date(iso))} UTC`;
}

/** The last so many days of UTC, today as the last. */
function lastDays(count, now = Date.now()) {
  return Array.from({ length: count }, (_, i) => new Date(now - (count - 1 - i) * DAY_MS).toISOString().slice(0, 10));
}
