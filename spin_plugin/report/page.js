// The grid of prompts and iterations, and the charts' readout. All texts of the run enter the page by textContent.
"use strict";

const STEP = 30; // rows drawn at a time
const MOST_CELLS = 4e6; // of the table by which two texts are compared
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("grid-data").textContent);

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- texts ----------------------------------------------------------------------------------------

const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/;

// Append a text, with control characters made visible: they could reorder or hide what stands beside them.
function append(parent, text) {
  for (const part of text.split(new RegExp(`(${INVISIBLE.source})`))) {
    if (!part) continue;
    if (part.length > 1 || !INVISIBLE.test(part)) parent.append(part);
    else parent.append(element("span", "control", `U+${part.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`));
  }
}

// Words with the spaces that follow them; characters where a text has no spaces.
function units(text, spaced) {
  if (!spaced) return Array.from(text, (letter) => [letter, ""]);
  return Array.from(text.matchAll(/([\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]|^)(\s*)/gu), ([, word, space]) => [word, space]);
}

// Compare two texts by their longest common subsequence of words: [kind, text], kind "same", "added" or "missing".
function compare(real, synthetic) {
  const spaced = /\S\s+\S/.test(real) || /\S\s+\S/.test(synthetic);
  const a = units(real, spaced), b = units(synthetic, spaced), parts = [];
  const equal = (i, j) => a[i][0] === b[j][0];
  const add = (kind, text) => {
    const last = parts[parts.length - 1];
    if (last && last[0] === kind) last[1] += text; else if (text) parts.push([kind, text]);
  };
  const missing = (i) => add("missing", a[i].join(""));
  const added = (j) => add("added", b[j].join(""));
  const same = (i, j) => {
    add("same", a[i][0]);
    if (a[i][1] === b[j][1]) return add("same", a[i][1]);
    add("missing", a[i][1]);
    add("added", b[j][1]);
  };
  let i = 0, j = 0, n = a.length, m = b.length;
  for (; i < n && i < m && equal(i, i); i++, j++) same(i, j);
  while (n > i && m > j && equal(n - 1, m - 1)) n--, m--;
  const first = i, width = m - first + 1, tabled = (n - first) * (m - first) <= MOST_CELLS;
  const best = new Uint16Array(tabled ? (n - first + 1) * width : 0), at = (k, l) => (k - first) * width + l - first;
  if (tabled)
    for (let k = n - 1; k >= first; k--)
      for (let l = m - 1; l >= first; l--)
        best[at(k, l)] = equal(k, l) ? best[at(k + 1, l + 1)] + 1 : Math.max(best[at(k + 1, l)], best[at(k, l + 1)]);
  while (i < n || j < m) {
    if (tabled && i < n && j < m && equal(i, j)) same(i++, j++);
    else if (j >= m || (i < n && (!tabled || best[at(i + 1, j)] >= best[at(i, j + 1)]))) missing(i++);
    else added(j++);
  }
  for (; i < a.length; i++, j++) same(i, j);
  return parts;
}

function textOf(cut, real) {
  const shown = element("div", "text");
  shown.dir = "auto";
  if (real === undefined) append(shown, cut.text);
  else for (const [kind, part] of compare(real.text, cut.text)) {
    if (kind === "missing" && !byId("missing").checked) continue;
    const parent = kind === "same" ? shown : shown.appendChild(element(kind === "added" ? "mark" : "del"));
    append(parent, part);
  }
  if (!cut.text) shown.append(element("span", "more", "(empty)"));
  if (cut.more) shown.append(element("span", "more", ` … ${cut.more.toLocaleString("en")} more characters`));
  return shown;
}

// A long prompt has lost its beginning; of a closed row's, the style sheet shows the last lines.
function promptOf(cut) {
  const shown = textOf({ text: cut.text }), made = element("div", "asked");
  if (cut.more) shown.prepend(element("span", "more", `${cut.more.toLocaleString("en")} earlier characters … `));
  made.append(shown);
  return made;
}

// --- rows -----------------------------------------------------------------------------------------

const every = (row) => Object.values(row.iterations).flat();
const known = data.rows.flatMap(every).filter((one) => one.reward_real !== null || one.reward_synthetic !== null);
const allRewards = known.flatMap((one) => [one.reward_real, one.reward_synthetic]);
const largest = allRewards.reduce((most, reward) => Math.max(most, Math.abs(reward)), 1e-9);
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(3);

function rewards(response) {
  const shown = element("div", "rewards");
  for (const [label, side, meaning] of [["r", "real", "reward of the real response"], ["r′", "synthetic", "reward of the synthetic response"]]) {
    const value = response[`reward_${side}`];
    if (value === null) continue;
    const name = element("span", side, label), bar = element("span", `bar ${side}`), part = element("i");
    name.title = meaning;
    const share = Math.abs(value) / largest * 50;
    part.style.width = `${share}%`;
    part.style.left = `${value < 0 ? 50 - share : 50}%`;
    bar.setAttribute("aria-hidden", "true");
    bar.append(part);
    shown.append(name, bar, element("span", side, signed(value)));
  }
  return shown;
}

function facts(response) {
  const shown = element("p", "facts");
  shown.append(element("span", "", `${response.tokens.toLocaleString("en")} tokens`));
  if (response.finish === "length") shown.append(element("span", "warn", "truncated"));
  else if (response.finish !== "stop") shown.append(element("span", "warn", String(response.finish)));
  if (response.equal) shown.append(element("span", "", "equal to the real one"));
  if (response.judge !== null) shown.append(element("span", "", `judge ${response.judge.toFixed(2)}`));
  return shown;
}

function cell(className, name) {
  const made = element("div", `cell ${className}`);
  made.setAttribute("role", className === "truth" ? "rowheader" : "cell");
  made.append(element("div", "name", name));
  return made;
}

function rowOf(row) {
  const made = element("div", "row"), prompt = element("div", "prompt"), inner = element("div");
  made.setAttribute("role", "row");
  made.tabIndex = -1;
  prompt.setAttribute("role", "cell");
  prompt.setAttribute("aria-colspan", data.numbers.length + 1);
  inner.append(element("span", "tag", `${row.split === "eval" ? "held out" : "train"} ${row.example}`), promptOf(row.prompt));
  prompt.append(inner);
  const truth = cell("truth", "real");
  truth.append(textOf(row.real), element("p", "facts", `${row.real_tokens.toLocaleString("en")} tokens`));
  const answers = element("div", "answers");
  answers.setAttribute("role", "presentation");
  for (const number of data.numbers) {
    const responses = row.iterations[number], made = cell("", `t = ${number}`);
    if (!responses) made.append(element("span", "more", "not asked"));
    for (const response of responses || []) {
      const sample = made.appendChild(element("div", "sample"));
      sample.append(textOf(response, row.real), facts(response), rewards(response));
    }
    answers.append(made);
  }
  made.append(prompt, truth, answers);
  return made;
}

// `response` has its text as {text, more} in `text`, like prompts and real responses, so that `textOf` takes either.
for (const response of data.rows.flatMap(every)) Object.assign(response, response.text);

// --- search, order, filters -----------------------------------------------------------------------

const grid = byId("grid");
let matching = [], drawn = 0;

const FILTERS = {
  "": () => true,
  differ: (one) => !one.equal,
  equal: (one) => one.equal,
  truncated: (one) => one.finish === "length",
};
const ORDERS = {
  order: (row) => (row.split === "eval" ? 1e15 : 0) + row.example,
  lowest_real: (row) => row.lowest_real,
  lowest_margin: (row) => row.lowest_margin,
  longest: (row) => -row.longest,
};
for (const row of data.rows)
  row.searched = [row.prompt.text, row.real.text, ...every(row).map((one) => one.text)].join("\n").toLowerCase();

function update() {
  const words = byId("search").value.toLowerCase(), split = byId("split").value, kind = FILTERS[byId("kind").value];
  const order = ORDERS[byId("sort").value];
  matching = data.rows.filter((row) => row.searched.includes(words) && (!split || row.split === split)
    && (kind === FILTERS[""] || every(row).some(kind)));
  const last = (value) => (value === null ? Infinity : value); // unknown ones at the end
  matching.sort((one, other) => last(order(one)) - last(order(other)) || ORDERS.order(one) - ORDERS.order(other));
  byId("count").textContent = `${matching.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} prompts`;
  const columns = element("div", "columns");
  columns.setAttribute("role", "row");
  for (const [place, name] of ["real response", ...data.numbers.map((number) => `t = ${number}`)].entries()) {
    const heading = element("div", "", name);
    heading.setAttribute("role", "columnheader");
    if (place === 1 && data.numbers[0] === 0) heading.append(" ", element("small", "", "the model you started from"));
    columns.append(heading);
  }
  grid.replaceChildren(columns);
  grid.scrollTop = 0;
  drawn = 0;
  draw();
  if (!matching.length) grid.append(element("p", "empty", "No prompt matches."));
}

function draw() {
  grid.append(...matching.slice(drawn, drawn + STEP).map(rowOf));
  drawn = Math.min(matching.length, drawn + STEP);
  byId("more").hidden = drawn === matching.length;
  const rows = rowsDrawn();
  if (rows.length && !rows.some((row) => row.tabIndex === 0)) rows[0].tabIndex = 0;
}

// --- keyboard -------------------------------------------------------------------------------------

const rowsDrawn = () => Array.from(grid.querySelectorAll(".row"));

function focusRow(place) {
  if (place >= drawn - 1 && drawn < matching.length) draw();
  const rows = rowsDrawn(), row = rows[Math.max(0, Math.min(place, rows.length - 1))];
  if (!row) return;
  for (const other of rows) other.tabIndex = other === row ? 0 : -1;
  row.focus({ preventScroll: true });
  const head = grid.firstChild.offsetHeight, above = row.getBoundingClientRect().top - grid.getBoundingClientRect().top - head;
  if (getComputedStyle(grid).overflowY === "visible") return row.scrollIntoView({ block: "nearest" });
  if (above < 0 || above + row.offsetHeight > grid.clientHeight - head) grid.scrollTop += above;
  grid.scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select, textarea");
  if (typing) {
    if (event.key === "Escape" && event.target.id === "search") {
      event.target.value = "";
      update();
      focusRow(0);
    }
    return;
  }
  const row = event.target.closest(".row"), place = row ? rowsDrawn().indexOf(row) : -1;
  const actions = { j: () => focusRow(place + 1), k: () => focusRow(Math.max(0, place - 1)), "/": () => byId("search").focus() };
  if (row) {
    const sideways = getComputedStyle(grid).overflowX === "visible" ? row.querySelector(".answers") : grid;
    const width = row.querySelector(".answers .cell").offsetWidth;
    Object.assign(actions, {
      ArrowDown: actions.j, ArrowUp: actions.k, Home: () => focusRow(0), End: () => focusRow(drawn - 1),
      ArrowRight: () => sideways.scrollBy({ left: width }), ArrowLeft: () => sideways.scrollBy({ left: -width }),
      Enter: () => row.classList.toggle("open"),
    });
  }
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

if (data.rows.length) {
  grid.style.setProperty("--columns", Math.max(1, data.numbers.length));
  for (const order of ["lowest_real", "lowest_margin"])
    if (data.rows.every((row) => row[order] === null)) {
      const option = byId("sort").querySelector(`[value=${order}]`);
      option.disabled = true;
      option.textContent += " (rewards not recorded)";
    }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("input", update);
  byId("more").addEventListener("click", draw);
  grid.addEventListener("click", (event) => {
    if (!getSelection().toString()) event.target.closest(".text")?.closest(".row")?.classList.toggle("open");
  });
  document.addEventListener("keydown", onKey);
  update();
}

// --- charts ---------------------------------------------------------------------------------------

const points = JSON.parse(byId("curve-data").textContent);
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg"), output = figure.querySelector("output"), cursor = svg.querySelector(".cursor");
  const { left, right, start, end } = Object.fromEntries(Object.entries(svg.dataset).map(([key, value]) => [key, Number(value)]));
  const metrics = figure.dataset.metrics.split(" ");
  const mine = points.filter((point) => metrics.some((name) => name in point));
  svg.addEventListener("pointermove", (event) => {
    const x = new DOMPoint(event.clientX, 0).matrixTransform(svg.getScreenCTM().inverse()).x;
    const step = start + (x - left) / (right - left) * (end - start);
    const point = mine.reduce((best, one) => (Math.abs(one.step - step) < Math.abs(best.step - step) ? one : best));
    const place = left + (point.step - start) / (end - start || 1) * (right - left);
    cursor.removeAttribute("hidden");
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    const values = metrics.map((name) => `${name.replace("spin/", "")} ${point[name] ?? "–"}`);
    output.textContent = `t = ${point.t}, step ${point.step.toLocaleString("en")}: ${values.join(", ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("hidden", "");
    output.textContent = "\u00a0";
  });
}
