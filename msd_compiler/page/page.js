"use strict";

const report = JSON.parse(document.getElementById("report").textContent);
const phases = report.pricing ? report.pricing.phases : [];
const alone = new Map(((report.verification || {}).sites || []).map((site) => [site.node, site.relative_l2]));
const noise = new Map(((report.evaluation || {}).sites || []).map((site) => [site.node, site]));

/* An element; children are elements or text, never markup: names come from the model. */
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function scaled(value, units) {
  if (value === undefined) return "–";
  const [size, name] = units.find(([unit]) => value >= unit) || units[units.length - 1];
  return `${Number((value / size).toPrecision(3))}\u00a0${name}`;
}
const clock = (seconds) => scaled(seconds, [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]);
const amount = (bytes) => scaled(bytes, [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]]);
const distance = (value) => (value === undefined ? "–" : value === 0 ? "0" : value.toExponential(1));

/* Light or dark: the system's, until the button says otherwise. */
const theme = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (systemDark.matches ? "dark" : "light")) === "dark";
const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
systemDark.addEventListener("change", showTheme);
showTheme();
theme.hidden = false;

/* On paper everything is shown. */
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));

const download = document.getElementById("download");
download.addEventListener("click", () => {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(report, null, 2) + "\n"], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
download.hidden = false;

const more = document.getElementById("more");
if (more) {
  const rest = document.getElementById("more-outputs");
  const show = (open) => {
    rest.hidden = !open;
    more.setAttribute("aria-expanded", String(open));
  };
  more.addEventListener("click", () => show(rest.hidden));
  show(false);
  more.hidden = false;
}

/* The table of sites. */
const table = document.getElementById("sites");
if (table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const details = new Map(); // by row, once it was opened

  const toggle = (row) => {
    const button = row.querySelector("th button");
    const open = button.getAttribute("aria-expanded") !== "true";
    if (open && !details.has(row)) {
      const detail = detailOf(row);
      detail.id = `detail-${row.dataset.site}`;
      button.setAttribute("aria-controls", detail.id);
      details.set(row, detail);
      row.after(detail);
    }
    details.get(row).hidden = !open;
    button.setAttribute("aria-expanded", String(open));
  };

  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr.site");
    if (row && (event.target.closest("button") || getSelection().isCollapsed)) toggle(row);
  });

  const search = document.getElementById("search");
  const filters = [...document.querySelectorAll("select[data-filter]")];
  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits =
        report.sites[row.dataset.site].node.toLowerCase().includes(wanted) &&
        filters.every((select) => !select.value || row.dataset[select.dataset.filter] === select.value);
      row.hidden = !fits;
      shown += fits;
      const detail = details.get(row);
      if (detail) detail.hidden = !fits || row.querySelector("th button").getAttribute("aria-expanded") !== "true";
    }
    const all = `${rows.length} site${rows.length === 1 ? "" : "s"}`;
    document.getElementById("count").textContent = shown === rows.length ? all : `${shown} of ${all}`;
    document.getElementById("none").hidden = shown > 0;
  };
  search.addEventListener("input", filter);
  filters.forEach((select) => select.addEventListener("change", filter));
  filter();

  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const heading = button.parentElement;
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const column = heading.cellIndex;
    const key = button.dataset.kind
      ? (row) => row.cells[column].dataset.value
      : (row) => row.cells[column].textContent.trim();
    const compare = button.dataset.kind
      ? (a, b) => a - b
      : new Intl.Collator("en", { numeric: true }).compare;
    /* What has no value stands last, either way. */
    const keyed = rows.map((row) => [key(row), row]);
    keyed.sort(([a], [b]) => (a === "") - (b === "") || (ascending ? compare(a, b) : compare(b, a)));
    rows.splice(0, rows.length, ...keyed.map(([, row]) => row));
    body.append(...rows.flatMap((row) => (details.has(row) ? [row, details.get(row)] : [row])));
  });
}

/* The row under a site's row: drawings, what was said, figures, and every way to compute it. */
function detailOf(row) {
  const site = report.sites[row.dataset.site];
  const drawings = element("div", "drawings");
  drawings.append(document.getElementById(`drawing-${row.dataset.drawing}`).content.cloneNode(true));
  const inside = element("div", "");
  for (const text of [site.reason, site.device_rule]) if (text) inside.append(element("p", "said", text));
  inside.append(drawings, factsOf(site));
  if (site.measured && site.measured.length) inside.append(timesOf(site));
  if (site.candidates && site.candidates.length) inside.append(candidatesOf(site));
  const cell = element("td", "", inside);
  cell.colSpan = row.cells.length;
  return element("tr", "detail", cell);
}

function factsOf(site) {
  const list = element("dl", "facts");
  const facts = {
    "form": site.form,
    [site.kind === "attention" ? "cache" : "weight"]: site.format,
    "M × K × N": site.k && site.n && `${site.m ?? "?"} × ${site.k} × ${site.n}`,
    "heads": site.heads && `${site.heads}, of keys and values ${site.kv_heads || site.heads}, size ${site.head_size}`,
    "scale shared by": site.group && `${site.group} steps of K`,
    "activation off by at most": site.error_bound !== undefined && `${distance(site.error_bound)} of its group’s largest`,
    "measured alone": alone.has(site.node) && distance(alone.get(site.node)),
    "weight in the result": site.weight_bytes && amount(site.weight_bytes),
    "cache, a token": site.cache_bytes && `${amount(site.source_cache_bytes)} → ${amount(site.cache_bytes)}`,
    "other kinds take": site.margin !== undefined && `${(100 * Math.abs(site.margin)).toFixed(0)} % ${site.margin < 0 ? "less" : "longer"}`,
  };
  const own = noise.get(site.node);
  if (own) {
    facts["crest on the text"] = own.crest.toPrecision(3);
    facts["weights off by a rounding"] = distance(own.weight_error);
    facts["activations in int8"] = `${distance(own.int8_error)}, ${own.int8_ratio.toPrecision(2)} of that`;
    facts["in two INT8 terms"] = `${distance(own.msd_error)}, ${own.msd_ratio.toPrecision(2)} of that`;
  }
  for (const [name, value] of Object.entries(facts)) if (value) list.append(element("dt", "", name), element("dd", "", value));
  return list;
}

function heading(text, className, scope = "col") {
  const made = element("th", className || "", text);
  made.scope = scope;
  return made;
}

/* What a site took, beside what was predicted. */
function timesOf(site) {
  const [kept, chosen] = [site.candidates?.[0], site.candidates?.find((candidate) => candidate.name === site.choice)];
  const head = element("tr", "", heading("Time"));
  for (const name of ["Before", "as predicted", "Now", "as predicted"]) head.append(heading(name, "number"));
  const body = element("tbody");
  for (const row of site.measured) {
    const at = phases.findIndex((phase) => phase.name === row.phase);
    const made = element("tr", "", heading(row.phase, "", "row"));
    for (const [ms, candidate] of [[row.before_ms, kept], [row.after_ms, chosen]])
      made.append(
        element("td", "number", clock(ms === undefined ? ms : ms / 1e3)),
        element("td", "number", clock(candidate?.phases?.[at]?.seconds)),
      );
    body.append(made);
  }
  return framed("Measured times", site, element("thead", "", head), body);
}

/* A table in the detail of a site, which scrolls sideways where the window is narrow. */
function framed(name, site, ...children) {
  const table = element("table", "", ...children);
  const frame = element("div", "candidates", table);
  frame.tabIndex = 0;
  frame.setAttribute("role", "region");
  for (const one of [table, frame]) one.setAttribute("aria-label", `${name} of ${site.node}`);
  return frame;
}

function candidatesOf(site) {
  const head = element("tr", "", heading("Candidate"));
  for (const phase of phases) head.append(heading(phase.name, "number"));
  head.append(heading("Mean", "number"), heading("Bytes", "number"), heading("Error", "number"), heading("Why not"));
  const chosen = site.candidates.find((candidate) => candidate.name === site.choice);
  const whyNot = (candidate) => {
    if (candidate === chosen) return "chosen";
    if (candidate.why_not || !chosen) return candidate.why_not || "";
    if (candidate.seconds > chosen.seconds) return "slower";
    return candidate.seconds === chosen.seconds && candidate.error > chosen.error ? "as fast, less accurate" : "";
  };
  const body = element("tbody");
  for (const candidate of site.candidates) {
    const priced = candidate.phases || [];
    const row = element("tr", candidate === chosen ? "chosen" : "", heading(candidate.name, "", "row"));
    phases.forEach((_, i) => row.append(element("td", "number", clock(priced[i]?.seconds))));
    const bytes = priced.length ? priced.reduce((sum, price, i) => sum + phases[i].share * price.bytes, 0) : undefined;
    row.append(
      element("td", "number", clock(candidate.seconds)),
      element("td", "number", amount(bytes)),
      element("td", "number", distance(candidate.error)),
      element("td", "why", whyNot(candidate)),
    );
    body.append(row);
  }
  return framed("Candidates", site, element("thead", "", head), body);
}
