"use strict";

const content = JSON.parse(document.getElementById("content").textContent);
const trials = content.trials;
const count = trials.number.length;
const place = new Map(trials.number.map((number, index) => [number, index]));
const onFront = new Map(content.front.trial.map((number, index) => [number, index]));
const charts = [];
let selected = null;

// --- words and numbers ------------------------------------------------------------------------------------

const known = (value) => value !== null && value !== undefined;
const whole = (value) => (known(value) ? value.toLocaleString("en") : "–");
const decimal = (value, digits = 3) => (known(value) ? value.toFixed(digits) : "–");
const significant = (value, digits = 4) => (known(value) ? String(Number(value.toPrecision(digits))) : "–");
const percent = (ratio) => (known(ratio) ? `${significant(100 * ratio, 3)} %` : "–");
const plural = (n, one, many) => `${whole(n)} ${n === 1 ? one : many ?? one + "s"}`;

function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 1) return `${significant(1000 * seconds, 2)} ms`;
  if (seconds < 59.5) return `${significant(seconds, 3)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  const minutes = Math.round(whole / 60);
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function elided(name, most) {
  const half = Math.floor((most - 1) / 2);
  return name.length <= most ? name : `${name.slice(0, half)}…${name.slice(-half)}`;
}

function measured(name, value) {
  if (!known(value)) return "–";
  return name === "parameters" || name === "macs" ? whole(value) : significant(value, 4);
}

const labelled = (name) => ({ macs: "MACs", size_ratio: "size" })[name] ?? name.replaceAll("_", " ");
const unit = (name) => content.objectives.find((objective) => objective.name === name)?.unit ?? "";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && known(value)) made.setAttribute(name, value);
  }
  made.append(...children.filter(known));
  return made;
}

function facts(rows, kind = "facts") {
  const list = element("dl", { class: kind });
  for (const [name, value] of rows) list.append(element("dt", {}, name), element("dd", {}, value));
  return list;
}

function bars(rows) {
  const made = element("div", { class: "bars" });
  for (const [name, share, value] of rows) {
    const width = `width: ${Math.max(0, Math.min(100, 100 * share)).toFixed(1)}%`;
    made.append(
      element("span", { class: "name" }, name),
      element("span", { class: "bar" }, element("i", { style: width })),
      element("span", { class: "value" }, value),
    );
  }
  return made;
}

// --- the head ---------------------------------------------------------------------------------------------

function head() {
  const complete = trials.status.filter((status) => status === "complete").length;
  const failed = trials.status.filter((status) => status === "failed").length;
  const stopped = trials.status.filter((status) => status === "stopped").length;
  const seconds = content.course.seconds.at(-1);
  const good = content.front.trial.filter((number) => trials.retention[place.get(number)] >= 0.95)[0];
  const parts = [`${plural(count, "trial")} in ${duration(seconds)}`, `${content.front.trial.length} on the front`];
  if (stopped) parts.push(`${stopped} stopped early`);
  if (failed) parts.push(`${failed} failed`);
  let words = `${parts.join(", ")}.`;
  if (known(good)) {
    const index = place.get(good);
    words += ` The smallest agent that keeps 95 % of the base's performance is trial ${good}, with ${percent(trials.size_ratio[index])} of its parameters.`;
  } else if (content.front.trial.length) {
    words += " No agent of the front keeps 95 % of the base's performance.";
  } else {
    words += ` No trial meets the constraints (${content.constraints.join(", ")}), so the front is empty.`;
  }
  document.getElementById("summary").textContent = words;
  const volumes = content.hypervolumes;
  const base = content.base;
  const performance = base.performance?.validation;
  const shown = [
    ["hypervolume", decimal(volumes.hypervolume), known(volumes.test_hypervolume) && content.front.trial.length ? `${decimal(volumes.test_hypervolume)} on test data` : "validation data"],
    ["base", whole(base.parameters), "parameters"],
  ];
  if (known(performance)) shown.push([labelled(content.performance) + " of the base", significant(performance, 4), unit(content.performance) || "validation data"]);
  for (const row of content.retention_at) {
    const size = trials.size_ratio[place.get(row.trial)];
    shown.push([`best at ≤ ${percent(row.size_ratio)}`, decimal(row.retention), known(row.trial) ? `retention, trial ${row.trial} (${percent(size)})` : "no trial so small"]);
  }
  const figures = document.getElementById("figures");
  for (const [name, value, note] of shown) {
    figures.append(element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, note))));
  }
}

// --- one trial --------------------------------------------------------------------------------------------

function select(index, scroll = false) {
  selected = index;
  detail();
  for (const row of document.querySelectorAll("#front-table tbody tr")) {
    if (Number(row.dataset.index) === index) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  }
  mark();
  const box = document.getElementById("detail").getBoundingClientRect();
  if (scroll && (box.top > innerHeight - 60 || box.bottom < 60)) document.getElementById("detail").scrollIntoView({ behavior: "smooth", block: "nearest" });
}

function standing(index) {
  if (onFront.has(trials.number[index])) return "on the front";
  if (trials.status[index] !== "complete") return trials.status[index] === "stopped" ? "stopped early" : trials.status[index];
  return trials.feasible[index] ? "dominated" : "misses the constraints";
}

// Latencies of the front are those measured again at the end, when nothing else ran.
function objectiveOf(name, index) {
  const row = onFront.get(trials.number[index]);
  return (known(row) ? content.front.latencies[row][name] : null) ?? trials.objectives[name][index];
}

// What trials measured besides objectives: of the front, latencies are those of the end here too.
function besides(index) {
  const row = onFront.get(trials.number[index]);
  return Object.entries(trials.measured).map(([name, values]) => [name, (known(row) ? content.front.latencies[row][name] : null) ?? values[index]]).filter(([, value]) => known(value));
}

function stability(index) {
  const [value, low, high] = ["stability", "stability_low", "stability_high"].map((name) => trials.measured[name]?.[index]);
  if (!known(value)) return null;
  return decimal(value) + (known(low) && known(high) ? ` (${decimal(low)} to ${decimal(high)})` : "");
}

function detail() {
  const panel = document.getElementById("detail");
  panel.replaceChildren();
  if (selected === null) {
    panel.append(element("p", {}, "Choose a point in the chart or a row of the table."));
    return;
  }
  const index = selected;
  const number = trials.number[index];
  const front = onFront.get(number);
  panel.append(element("h3", { "aria-live": "polite" }, `Trial ${number}`));
  const tags = element("p", {}, element("span", { class: "tag" }, trials.origin[index]));
  tags.append(element("span", { class: "tag" }, standing(index)));
  if (number === content.knee) tags.append(element("span", { class: "tag" }, "knee"));
  panel.append(tags);
  const rows = [
    ["size", percent(trials.size_ratio[index])],
    ["parameters", whole(trials.parameters[index])],
    ["MACs per decision", whole(trials.macs[index])],
    ["retention", decimal(trials.retention[index])],
  ];
  if (known(front)) rows.push(["retention, test", decimal(content.front.test_retention[front])]);
  for (const objective of content.objectives) {
    if (objective.name === "parameters" || objective.name === "macs") continue;
    rows.push([labelled(objective.name), `${measured(objective.name, objectiveOf(objective.name, index))} ${objective.unit}`]);
  }
  if (known(stability(index))) rows.push(["stability, empirical", stability(index)]);
  for (const [name, value] of besides(index)) if (!name.startsWith("stability")) rows.push([labelled(name), measured(name, value)]);
  if (trials.reason[index]) rows.push(["reason", trials.reason[index]]);
  panel.append(facts(rows));
  const widths = trials.groups.map((group, column) => [group, trials.widths[index][column], content.base.widths?.[group]]).filter(([, kept]) => known(kept));
  if (widths.length) {
    panel.append(element("h4", {}, "Channels kept, of the base's"));
    panel.append(bars(widths.map(([group, kept, of]) => [group, kept / (of ?? kept), `${whole(kept)} / ${whole(of)}`])));
  }
  const chosen = (kind) => Object.entries(content.choices).filter(([name, values]) => name.startsWith(kind) && known(values[index])).map(([name, values]) => [name.slice(kind.length), values[index]]);
  const weights = chosen("weight ");
  if (weights.length) {
    panel.append(element("h4", {}, "Metrics mixed"));
    panel.append(bars(weights.map(([name, weight]) => [name, weight, decimal(weight, 2)])));
  }
  const options = chosen("option ");
  if (options.length) panel.append(element("h4", {}, "Options"), facts(options.map(([name, value]) => [name, String(value)])));
  const timings = trials.stages.map((stage, column) => [stage, trials.timings[index][column]]).filter(([, seconds]) => known(seconds));
  if (timings.length) {
    const total = timings.reduce((sum, [, seconds]) => sum + seconds, 0);
    panel.append(element("h4", {}, `Time: ${duration(total)} on ${trials.device[index] || "?"}`));
    panel.append(bars(timings.map(([stage, seconds]) => [stage.replaceAll("_", "-"), total ? seconds / total : 0, duration(seconds)])));
  }
  if (known(front)) {
    const command = `prunefront select ${content.path} --trial ${number} --out trial-${number}`;
    const code = element("code", {}, command);
    const button = element("button", { type: "button", onclick: () => copy(command, code, button) }, "Copy");
    panel.append(element("h4", {}, "Take it"), element("div", { class: "command" }, code, button));
  } else if (trials.status[index] === "complete") {
    panel.append(element("p", {}, "Weights are kept for the front only."));
  }
}

async function copy(text, code, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy"); // pages from a file may have no clipboard
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function table() {
  const others = content.objectives.filter((objective) => !["parameters", "macs"].includes(objective.name));
  const steady = content.front.trial.some((number) => known(stability(place.get(number))));
  const heads = ["trial", "size", "parameters", "MACs", "retention", "test", ...others.map((o) => labelled(o.name)), ...(steady ? ["stability (95 %)"] : []), "proposed by"];
  const body = element("tbody");
  content.front.trial.forEach((number, row) => {
    const index = place.get(number);
    const cells = [
      number, percent(trials.size_ratio[index]), whole(trials.parameters[index]), whole(trials.macs[index]),
      decimal(trials.retention[index]), decimal(content.front.test_retention[row]),
      ...others.map((o) => measured(o.name, objectiveOf(o.name, index))),
      ...(steady ? [stability(index) ?? "–"] : []),
    ];
    const line = element("tr", { tabindex: 0, "data-index": index, onclick: () => select(index, true) });
    line.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); select(index, true); }
    });
    for (const cell of cells) line.append(element("td", {}, String(cell)));
    line.append(element("td", { class: "text" }, trials.origin[index]));
    body.append(line);
  });
  const headRow = element("tr");
  heads.forEach((name, i) => headRow.append(element("th", { scope: "col", class: i === heads.length - 1 ? "text" : null }, name)));
  document.getElementById("front-table").append(element("table", {}, element("thead", {}, headRow), body));
  if (content.stability) document.getElementById("stability").textContent = content.stability;
}

// --- what needs no charts ---------------------------------------------------------------------------------

function parameters() {
  const entries = Object.entries(content.parameters);
  document.getElementById("parameters-section").hidden = !entries.length;
  const room = document.getElementById("parameters");
  for (const [name, { foretold, shares }] of entries) {
    const rows = Object.entries(shares).slice(0, 12);
    const most = Math.max(...rows.map(([, share]) => share), 1e-9);
    const note = element("p", { class: "note" }, `Choices foretell ${percent(Math.round(100 * foretold) / 100)} of its variance for trials that were not looked at.`);
    room.append(element("div", {}, element("h3", {}, labelled(name)), bars(rows.map(([choice, share]) => [choice, share / most, percent(share)])), note));
  }
}

function failures() {
  document.getElementById("failures-section").hidden = !content.failures.length;
  const body = element("tbody");
  for (const failure of content.failures) {
    const numbers = failure.trials.slice(0, 12).join(", ") + (failure.trials.length > 12 ? " …" : "");
    body.append(element("tr", {}, element("td", {}, String(failure.trials.length)), element("td", { class: "long" }, failure.reason), element("td", { class: "text" }, numbers)));
  }
  const heads = element("tr", {}, element("th", { scope: "col" }, "times"), element("th", { scope: "col", class: "text" }, "reason"), element("th", { scope: "col", class: "text" }, "trials"));
  document.getElementById("failures").append(element("table", {}, element("thead", {}, heads), body));
}

function experiment() {
  const base = content.base;
  const room = document.getElementById("experiment");
  const environment = base.environment ?? {};
  const training = base.mode === "per_trial" ? "every trial trained its own" : duration(base.training_seconds);
  room.append(element("div", {}, element("h3", {}, "Base"), facts([
    ["parameters", whole(base.parameters)], ["MACs per decision", whole(base.macs)], ["seed", String(base.seed)],
    ["training", training],
    ...["validation", "test"].filter((split) => known(base.performance?.[split])).map((split) => [`${labelled(content.performance)}, ${split}`, significant(base.performance[split], 4)]),
    ...["validation", "test"].filter((split) => known(base.trivial?.[split])).map((split) => [`trivial agent, ${split}`, significant(base.trivial[split], 4)]),
  ])));
  const machine = Object.entries(environment).filter(([name]) => name !== "host").map(([name, value]) => [name, String(value)]);
  if (machine.length) room.append(element("div", {}, element("h3", {}, "Versions and machine"), facts(machine)));
  const stages = Object.entries(content.stages).filter(([, seconds]) => known(seconds));
  const total = stages.reduce((sum, [, seconds]) => sum + seconds, 0);
  room.append(element("div", {}, element("h3", {}, "Median trial"), bars(stages.map(([stage, seconds]) => [stage.replaceAll("_", "-"), total ? seconds / total : 0, duration(seconds)]))));
  const hosts = Object.entries(content.hosts).map(([host, n]) => [host, plural(n, "trial")]);
  const devices = Object.entries(content.devices).map(([device, n]) => [device, plural(n, "trial")]);
  if (hosts.length) room.append(element("div", {}, element("h3", {}, "Where trials ran"), facts([...hosts, ...devices])));
  document.getElementById("configuration").textContent = content.configuration;
}

// --- charts -----------------------------------------------------------------------------------------------

const drawn = {};

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function look() {
  const text = colour("soft");
  const axis = {
    axisLabel: { color: text }, nameTextStyle: { color: text }, axisLine: { lineStyle: { color: colour("line") } },
    splitLine: { lineStyle: { color: colour("line"), opacity: 0.6 } },
  };
  const tooltip = { backgroundColor: colour("raised"), borderColor: colour("line"), textStyle: { color: colour("text"), fontSize: 13 }, confine: true };
  return { axis, tooltip, text };
}

function chartIn(id) {
  const made = window.charts.init(document.getElementById(id), null, { renderer: "svg" });
  charts.push(made);
  new ResizeObserver(() => made.resize()).observe(document.getElementById(id));
  return made;
}

function about(index) {
  const number = trials.number[index];
  const front = onFront.get(number);
  const lines = [`<b>Trial ${number}</b> · ${safe(trials.origin[index])}`, `${percent(trials.size_ratio[index])}, ${whole(trials.parameters[index])} parameters`, `retention ${decimal(trials.retention[index])}`];
  if (known(front) && known(content.front.test_retention[front])) lines[2] += ` (test ${decimal(content.front.test_retention[front])})`;
  for (const objective of content.objectives) {
    if (objective.name === "parameters") continue;
    lines.push(`${safe(labelled(objective.name))} ${measured(objective.name, objectiveOf(objective.name, index))} ${safe(objective.unit)}`);
  }
  if (known(stability(index))) lines.push(`stability ${stability(index)}`);
  return lines.join("<br>");
}

const safe = (text) => String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

// At most so many, evenly spread: more than these nobody can tell apart, and browsers become slow.
function thinned(indices, most) {
  if (indices.length <= most) return indices;
  return Array.from({ length: most }, (_, i) => indices[Math.floor((i * indices.length) / most)]);
}

const LEAST = -0.2; // what retains less is drawn at this edge
let mark = () => {};

function frontChart() {
  const chart = chartIn("front-chart");
  chart.on("click", (event) => { if (known(event.data?.index)) select(event.data.index, true); });
  const indices = trials.number.map((_, index) => index).filter((index) => trials.status[index] === "complete" && known(trials.retention[index]));
  const members = content.front.trial.map((number) => place.get(number));
  const isAnchor = (index) => trials.origin[index].startsWith("anchor");
  const others = indices.filter((index) => !onFront.has(trials.number[index]));
  const lowest = Math.min(0, ...members.map((_, row) => content.front.test_retention[row] ?? 0), ...thinned(indices, 5000).map((index) => trials.retention[index]));
  const floor = Math.max(LEAST, Math.floor(lowest * 10) / 10);
  const point = (index, value = trials.retention[index]) => {
    const found = { value: [100 * trials.size_ratio[index], Math.max(value, floor)], index };
    return value < floor ? { ...found, symbol: "triangle", symbolRotate: 180 } : found;
  };
  const kinds = {
    dominated: thinned(others.filter((index) => trials.feasible[index] && !isAnchor(index)), 2000),
    "misses the constraints": thinned(others.filter((index) => !trials.feasible[index] && !isAnchor(index)), 1000),
    baselines: others.filter(isAnchor),
  };
  const below = others.filter((index) => trials.retention[index] < floor).length;
  const hidden = others.length - Object.values(kinds).flat().length;
  const notes = [];
  if (below) notes.push(`${plural(below, "trial")} below ${floor} at the lower edge (▼).`);
  if (hidden) notes.push(`Of ${whole(others.length)} trials that are not on the front, ${whole(others.length - hidden)} are drawn.`);
  document.getElementById("front-note").textContent = notes.join(" ");
  const ring = () => (selected !== null && known(trials.retention[selected]) && trials.status[selected] === "complete" ? [{ ...point(selected), symbol: "circle" }] : []);
  mark = () => chart.setOption({ series: [{ name: "selected", data: ring() }] });
  drawn.front = () => {
    const { axis, tooltip, text } = look();
    const linear = document.getElementById("front-linear").checked;
    const tested = document.getElementById("front-test").checked && content.front.test_retention.some(known);
    const narrow = window.innerWidth < 560;
    const best = [];
    let highest = -Infinity;
    for (const index of members) {
      if (trials.retention[index] > highest) { highest = trials.retention[index]; best.push({ value: point(index).value }); }
    }
    if (best.length) best.push({ value: [100, Math.max(highest, floor)] });
    const scatter = (name, data, size, itemStyle, z, more = {}) => ({ name, type: "scatter", symbolSize: size, data, itemStyle, z, ...more });
    const series = [
      scatter("dominated", kinds.dominated.map((index) => point(index)), 7, { color: colour("faint"), opacity: 0.55 }, 1),
      scatter("misses the constraints", kinds["misses the constraints"].map((index) => point(index)), 7, { color: "transparent", borderColor: colour("faint"), borderWidth: 1.2 }, 1),
      scatter("baselines", kinds.baselines.map((index) => point(index)), 11, { color: colour("anchor"), opacity: 0.9 }, 2, { symbol: "diamond" }),
      { name: "front line", type: "line", step: "end", symbol: "none", silent: true, data: best, lineStyle: { color: colour("front"), width: 2 }, z: 3 },
      scatter("front", members.map((index) => point(index)), 10, { color: colour("front") }, 4),
      scatter("front, test data", tested ? members.map((index, row) => [index, content.front.test_retention[row]]).filter(([, value]) => known(value)).map(([index, value]) => point(index, value)) : [], 7, { color: "transparent", borderColor: colour("test"), borderWidth: 1.6 }, 5),
      scatter("base", [{ value: [100, 1] }], 13, { color: colour("base") }, 6, { symbol: "triangle" }),
      scatter("selected", ring(), 19, { color: "transparent", borderColor: colour("text"), borderWidth: 2 }, 7, { silent: true }),
    ].filter((one) => one.name === "selected" || one.data.length);
    chart.setOption({
      animation: false,
      aria: { enabled: true, label: { description: `Size against retention: ${plural(members.length, "trial")} on the front; the table below has all of them.` } },
      grid: { left: 52, right: 18, top: narrow ? 76 : 40, bottom: 46 },
      legend: { top: 0, textStyle: { color: text }, data: series.map((one) => one.name).filter((name) => !["front line", "selected"].includes(name)) },
      tooltip: { ...tooltip, trigger: "item", formatter: (event) => (known(event.data?.index) ? about(event.data.index) : "<b>Base</b><br>" + whole(content.base.parameters) + " parameters") },
      xAxis: { ...axis, type: linear ? "value" : "log", min: linear ? 0 : (value) => Math.min(value.min * 0.9, 1), max: 105, name: "size, % of the base's parameters", nameLocation: "middle", nameGap: 28, axisLabel: { color: text, showMinLabel: false, formatter: (value) => (value > 100 ? "" : significant(value, 2)) }, minorSplitLine: { show: false } },
      yAxis: { ...axis, type: "value", min: floor, max: (value) => Math.max(1.02, Math.ceil(value.max * 50) / 50), name: "retention", axisLabel: { color: text, formatter: (value) => decimal(value, 1) } },
      series,
    }, { notMerge: true });
  };
  drawn.front();
  document.getElementById("front-test").parentElement.hidden = !content.front.test_retention.some(known);
  for (const id of ["front-linear", "front-test"]) document.getElementById(id).addEventListener("change", () => drawn.front());
}

function courseChart() {
  const chart = chartIn("course-chart");
  drawn.course = () => {
    const { axis, tooltip, text } = look();
    const over = document.querySelector("input[name=course]:checked").value;
    const longest = content.course.seconds.at(-1) ?? 0;
    const [scale, name] = over === "trials" ? [1, "finished trials"] : longest > 7200 ? [3600, "hours"] : longest > 120 ? [60, "minutes"] : [1, "seconds"];
    const data = content.course.hypervolume.map((value, row) => [over === "trials" ? row + 1 : (content.course.seconds[row] ?? 0) / scale, value]);
    chart.setOption({
      animation: false, grid: { left: 52, right: 18, top: 20, bottom: 46 },
      aria: { enabled: true, label: { description: `Hypervolume over ${name}: ${decimal(content.course.hypervolume.at(-1))} in the end.` } },
      tooltip: { ...tooltip, trigger: "axis", formatter: ([event]) => `${significant(event.value[0], 3)} ${name}<br>hypervolume ${decimal(event.value[1])}` },
      xAxis: { ...axis, type: "value", min: 0, max: "dataMax", name, nameLocation: "middle", nameGap: 28, axisLabel: { color: text, hideOverlap: true, formatter: (value) => significant(value, 3) } },
      yAxis: { ...axis, type: "value", min: 0, axisLabel: { color: text, formatter: (value) => decimal(value, 2) } },
      series: [{ type: "line", step: "end", symbol: "none", data, lineStyle: { color: colour("front"), width: 2 }, areaStyle: { color: colour("front"), opacity: 0.12 } }],
    }, { notMerge: true });
  };
  drawn.course();
  for (const input of document.querySelectorAll("input[name=course]")) input.addEventListener("change", () => drawn.course());
}

function parallelChart() {
  // Weights that no trial varies, as those that the experiment gives, say nothing here.
  const names = Object.keys(content.choices).filter((name) => !name.startsWith("weight ") || new Set(content.choices[name].filter(known)).size > 1);
  const measuredOnes = trials.number.map((_, index) => index).filter((index) => trials.status[index] === "complete" && known(trials.retention[index]));
  const indices = [...thinned(measuredOnes.filter((index) => !onFront.has(trials.number[index])), 500), ...measuredOnes.filter((index) => onFront.has(trials.number[index]))];
  const room = document.getElementById("parallel-chart");
  if (!names.length || indices.length < 2) { document.getElementById("parallel-section").hidden = true; return; }
  const axes = [
    ...names.map((name) => ({ name: name.replace(/^(share|weight|option) /, ""), log: name.startsWith("share "), values: content.choices[name] })),
    { name: "size, %", log: true, values: trials.size_ratio.map((ratio) => (known(ratio) ? 100 * ratio : null)) },
    { name: "retention", log: false, values: trials.retention },
  ];
  room.style.minWidth = `${88 * axes.length}px`;
  const chart = chartIn("parallel-chart");
  drawn.parallel = () => {
    const { axis, tooltip, text } = look();
    const last = axes.length - 1;
    chart.setOption({
      animation: false,
      parallel: { left: 40, right: 60, top: 50, bottom: 24, parallelAxisDefault: { nameTextStyle: { color: text, fontSize: 12 }, axisLabel: { ...axis.axisLabel, fontSize: 11, formatter: (value) => significant(value, 2) }, axisLine: axis.axisLine, axisTick: { lineStyle: { color: colour("line") } } } },
      tooltip: { ...tooltip, trigger: "item", formatter: (event) => (known(event.data?.index) ? about(event.data.index) : "") },
      visualMap: { show: false, dimension: last, min: 0, max: 1, inRange: { color: [colour("low"), colour("faint"), colour("high")] }, seriesIndex: 0 },
      parallelAxis: axes.map((entry, dim) => ({ dim, name: elided(entry.name, 13), type: entry.log ? "log" : "value", scale: true })),
      series: [{ type: "parallel", lineStyle: { width: 1.2, opacity: indices.length > 300 ? 0.25 : 0.5 }, emphasis: { lineStyle: { width: 3, opacity: 1 } }, data: indices.map((index) => ({ value: axes.map((entry) => entry.values[index]), index })) }],
    }, { notMerge: true });
  };
  drawn.parallel();
  chart.on("click", (event) => { if (known(event.data?.index)) select(event.data.index, true); });
}

// Everything about importance that needs no charts: what there is to choose, the table, what is left out.
function importanceSection() {
  const found = content.importance;
  const section = document.getElementById("importance-section");
  if (!found.steps) { section.hidden = true; return; }
  const names = Object.keys(found.metrics);
  const choose = document.getElementById("importance-metric");
  for (const metric of names) choose.append(element("option", { value: metric }, metric));
  const groups = Math.max(0, ...Object.values(found.metrics).map((metric) => metric.groups.length));
  const sized = (id, height) => (document.getElementById(id).style.height = `${height}px`);
  sized("importance-chart", Math.max(200, 110 + 24 * groups));
  sized("ranks-chart", Math.max(220, 70 + 24 * groups));
  sized("agreement-chart", 80 + 34 * found.agreement.metrics.length);
  for (const block of section.querySelectorAll("[data-needs]")) {
    const parts = names.some((name) => Object.keys(found.metrics[name].parts).length > 1);
    block.hidden = { groups: !names.length, parts: !parts, ranks: found.steps.length < 2 || groups < 2, shifts: !Object.values(found.shifts).flat().length }[block.dataset.needs];
  }
  const body = element("tbody");
  const head = element("tr");
  for (const name of ["metric", "of training", "groups", "channels", ...found.top.map((top) => `top ${percent(top)}`)]) head.append(element("th", { scope: "col", class: name === "metric" ? "text" : null }, name));
  for (const [metric, shifts] of Object.entries(found.shifts)) {
    shifts.forEach((shift, row) => {
      const line = element("tr", {}, element("td", { class: "text" }, row ? "" : metric), element("td", {}, percent(shift.share)), element("td", {}, decimal(shift.groups, 2)), element("td", {}, decimal(shift.channels, 2)));
      for (const value of shift.overlap) line.append(element("td", {}, known(value) ? `${Math.round(100 * value)} %` : "–"));
      body.append(line);
    });
  }
  document.getElementById("shifts").append(element("table", {}, element("thead", {}, head), body));
  choose.addEventListener("change", () => { for (const name of ["importance", "ranks", "parts"]) drawn[name]?.(); });
}

const chosenMetric = () => document.getElementById("importance-metric").value;

// One colour for each component, wherever it is drawn; coupling groups have the text's.
function partColour(part) {
  if (part === "coupling" || part === "component-specific") return colour("text");
  const parts = [...new Set(Object.values(content.importance.components))].filter((name) => name !== "coupling");
  return colour(`part-${parts.indexOf(part) % 8}`);
}

function importanceChart() {
  const found = content.importance;
  const chart = chartIn("importance-chart");
  drawn.importance = () => {
    const { axis, tooltip, text } = look();
    const { groups, values } = found.metrics[chosenMetric()];
    const data = values.flatMap((row, y) => row.map((value, x) => [x, y, value])).filter(([, , value]) => known(value));
    const reach = Math.min(6, Math.max(1, ...data.map(([, , value]) => Math.abs(value))));
    chart.setOption({
      animation: false, grid: { left: 8, right: 18, top: 8, bottom: 92, containLabel: true },
      aria: { enabled: true, label: { description: `Importance of ${plural(groups.length, "group")} over training, by ${chosenMetric()}.` } },
      tooltip: { ...tooltip, formatter: (event) => `${safe(groups[event.value[1]])}<br>after ${whole(found.steps[event.value[0]])} steps: ${event.value[2] > 0 ? "+" : ""}${decimal(event.value[2], 2)}` },
      xAxis: { ...axis, type: "category", data: found.steps.map(whole), name: "training steps", nameLocation: "middle", nameGap: 28, splitLine: { show: false } },
      yAxis: { ...axis, type: "category", data: groups, inverse: true, splitLine: { show: false } },
      visualMap: { min: -reach, max: reach, calculable: true, orient: "horizontal", left: "center", bottom: 0, textStyle: { color: text }, precision: 1, inRange: { color: [colour("low"), colour("middle"), colour("high")] } },
      series: [{ type: "heatmap", data, progressive: 0 }],
    }, { notMerge: true });
  };
  drawn.importance();
}

// The x axis of charts over training.
function overTraining(axis, text, margin = 8) {
  return { ...axis, type: "value", min: "dataMin", max: "dataMax", name: "training steps", nameLocation: "middle", nameGap: 30, splitLine: { show: false }, axisLabel: { color: text, margin, hideOverlap: true, showMinLabel: true, showMaxLabel: true, formatter: whole } };
}

function ranksChart() {
  const found = content.importance;
  const chart = chartIn("ranks-chart");
  drawn.ranks = () => {
    const { axis, tooltip, text } = look();
    const { groups, ranks } = found.metrics[chosenMetric()];
    const narrow = window.innerWidth < 560;
    const dashes = ["solid", "dashed", "dotted"];
    const seen = new Map();
    const series = groups.map((group, row) => {
      const part = found.components[group];
      const nth = seen.get(part) ?? 0;
      seen.set(part, nth + 1);
      const paint = partColour(part);
      return {
        name: group, type: "line", symbol: "circle", symbolSize: 5, triggerLineEvent: true, connectNulls: true,
        data: ranks[row].map((rank, place) => [found.steps[place], rank]),
        lineStyle: { color: paint, width: part === "coupling" ? 3.5 : 1.8, type: dashes[nth % 3] }, itemStyle: { color: paint },
        endLabel: { show: true, color: paint, formatter: () => elided(group, narrow ? 11 : 20), fontSize: narrow ? 11 : 12 },
        emphasis: { focus: "series", endLabel: { show: true } },
      };
    });
    chart.setOption({
      animation: false, grid: { left: 40, right: narrow ? 92 : 150, top: 14, bottom: 46 },
      aria: { enabled: true, label: { description: `Ranks of ${plural(groups.length, "group")} over training, by ${chosenMetric()}.` } },
      tooltip: { ...tooltip, trigger: "item", formatter: (event) => (event.value ? `${safe(event.seriesName)}<br>rank ${significant(event.value[1], 3)} of ${groups.length} after ${whole(event.value[0])} steps` : safe(event.seriesName)) },
      xAxis: overTraining(axis, text, 14),
      yAxis: { ...axis, type: "value", inverse: true, min: 1, max: groups.length, interval: groups.length > 30 ? null : 1, axisLabel: { color: text, formatter: (value) => significant(value, 3) } },
      series,
    }, { notMerge: true });
  };
  drawn.ranks();
}

function partsChart() {
  const found = content.importance;
  const chart = chartIn("parts-chart");
  drawn.parts = () => {
    const { axis, tooltip, text } = look();
    const { parts } = found.metrics[chosenMetric()];
    const kinds = ["coupling", "component-specific"];
    const series = Object.entries(parts).map(([name, values]) => {
      const paint = partColour(name);
      return {
        name, type: "line", symbol: "circle", symbolSize: 5, triggerLineEvent: true, data: values.map((value, place) => [found.steps[place], value]),
        lineStyle: { color: paint, width: kinds.includes(name) ? 3.5 : 1.8, type: name === "component-specific" ? "dashed" : "solid" }, itemStyle: { color: paint }, emphasis: { focus: "series" },
      };
    });
    chart.setOption({
      animation: false, grid: { left: 52, right: 18, top: window.innerWidth < 560 ? 84 : 44, bottom: 46 },
      legend: { top: 0, textStyle: { color: text } },
      aria: { enabled: true, label: { description: `Importance of components and couplings over training, by ${chosenMetric()}.` } },
      tooltip: { ...tooltip, trigger: "item", formatter: (event) => (event.value ? `${safe(event.seriesName)}<br>after ${whole(event.value[0])} steps: ${event.value[1] > 0 ? "+" : ""}${decimal(event.value[1], 2)}` : safe(event.seriesName)) },
      xAxis: overTraining(axis, text),
      yAxis: { ...axis, type: "value", scale: true, axisLabel: { color: text, formatter: (value) => (value > 0 ? "+" : "") + significant(value, 3) } },
      series,
    }, { notMerge: true });
  };
  drawn.parts();
}

function agreementChart() {
  const { metrics, values } = content.importance.agreement;
  const chart = chartIn("agreement-chart");
  drawn.agreement = () => {
    const { axis, tooltip, text } = look();
    const data = values.flatMap((row, y) => row.map((value, x) => [x, y, value])).filter(([, , value]) => known(value));
    const narrow = window.innerWidth < 560;
    chart.setOption({
      animation: false, grid: { left: 8, right: 18, top: 8, bottom: 8, containLabel: true },
      aria: { enabled: true, label: { description: `Rank correlation of ${plural(metrics.length, "metric")} with one another.` } },
      tooltip: { ...tooltip, formatter: (event) => `${safe(metrics[event.value[1]])} and ${safe(metrics[event.value[0]])}: ${decimal(event.value[2], 2)}` },
      xAxis: { ...axis, type: "category", data: metrics, splitLine: { show: false }, axisLabel: { color: text, interval: 0, rotate: narrow ? 60 : 0 } },
      yAxis: { ...axis, type: "category", data: metrics, inverse: true, splitLine: { show: false }, axisLabel: { color: text, interval: 0 } },
      visualMap: { show: false, min: -1, max: 1, inRange: { color: [colour("low"), colour("middle"), colour("agree")] } },
      series: [{ type: "heatmap", data, progressive: 0, label: { show: true, color: colour("text"), fontSize: narrow ? 10 : 12, formatter: (event) => decimal(event.value[2], 2) } }],
    }, { notMerge: true });
  };
  drawn.agreement();
}

async function library() {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent.trim()), (sign) => sign.charCodeAt(0));
  const source = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = source;
  document.head.append(script);
}

const pending = new Map([["course-chart", courseChart], ["parallel-chart", parallelChart], ["importance-chart", importanceChart], ["ranks-chart", ranksChart], ["parts-chart", partsChart], ["agreement-chart", agreementChart]]);

function draw(id) {
  const make = pending.get(id);
  pending.delete(id);
  if (!document.getElementById(id).closest("[hidden]")) make?.();
}

function redraw() {
  for (const again of Object.values(drawn)) again();
}

// Charts keep the width that they have on the screen unless the page is as wide as the paper while they are drawn.
function forPaper(printing) {
  if (printing) document.documentElement.dataset.theme = "light";
  else delete document.documentElement.dataset.theme;
  document.documentElement.toggleAttribute("data-paper", printing);
  [...pending.keys()].forEach(draw);
  redraw();
  for (const chart of charts) {
    chart.resize();
    chart.getZr().flush(); // or it is drawn in the next frame, which paper does not wait for
  }
}

async function main() {
  head();
  table();
  parameters();
  failures();
  experiment();
  importanceSection();
  const first = content.knee ?? content.front.trial[0];
  if (known(first)) selected = place.get(first);
  detail();
  try {
    await library();
    frontChart();
  } catch (error) {
    const warning = document.getElementById("warning");
    warning.textContent = `This browser cannot draw the charts (${error.message}); the tables are complete.`;
    warning.hidden = false;
    return;
  }
  select(selected);
  // Below the fold, when they come into view: the front does not wait for them.
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { watch.unobserve(entry.target); draw(entry.target.id); }
  }, { rootMargin: "300px" });
  for (const id of pending.keys()) watch.observe(document.getElementById(id));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => forPaper(true));
  addEventListener("afterprint", () => forPaper(false));
  document.documentElement.dataset.ready = "true";
}

main();
