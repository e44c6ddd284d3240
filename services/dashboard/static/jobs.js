// All jobs: searched, filtered, sorted, and live.
import { connection, count, duration, h, number, pill, progress, recall, remember, when } from "./util.js";

const LIVE = ["QUEUED", "STARTING", "RUNNING", "PAUSING", "PAUSED", "RECOVERING", "CANCELLING"];
const GROUPS = {
  all: () => true,
  live: (job) => LIVE.includes(job.state),
  succeeded: (job) => job.state === "SUCCEEDED",
  failed: (job) => job.state === "FAILED" || job.state === "CANCELLED",
};
const COLUMNS = [
  ["id", "Job", (job) => job.id],
  ["state", "State", (job) => job.state],
  ["progress", "Progress", (job) => job.step / Math.max(1, job.total_steps)],
  ["eta", "Time left", (job) => job.eta_seconds ?? Infinity],
  ["loss", "Loss", (job) => job.loss ?? Infinity],
  ["speed", "Samples/s", (job) => -(job.samples_per_second ?? 0)],
  ["created", "Created", (job) => -job.created],
  ["reason", "What it is doing", (job) => job.reason],
];

function spark(values) {
  const numbers = values.filter((value) => value !== null);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", "0 0 100 24");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  if (numbers.length < 2) return svg;
  const low = Math.min(...numbers), high = Math.max(...numbers);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  let pen = "M";
  line.setAttribute("d", values.map((value, index) => {
    if (value === null) { pen = "M"; return ""; }
    const point = `${pen}${((100 * index) / (values.length - 1)).toFixed(1)} ${(22 - (20 * (value - low)) / (high - low || 1)).toFixed(1)}`;
    pen = "L";
    return point;
  }).join(""));
  svg.append(line);
  return svg;
}

function findings(job) {
  if (!job.findings.length) return null;
  const worst = job.findings.some((each) => each.severity === "critical") ? "critical" : "warning";
  const rules = [...new Set(job.findings.map((each) => each.rule.replace("_", " ")))].join(", ");
  return h("span", { class: `badge ${worst}`, title: rules }, `${job.findings.length} ${job.findings.length === 1 ? "finding" : "findings"}`);
}

function row(job) {
  return h("tr", { class: "link" },
    h("td", { class: "name" }, h("a", { href: `/jobs/${encodeURIComponent(job.id)}` }, job.id)),
    h("td", {}, pill(job.state), findings(job)),
    h("td", {}, progress(job.step, job.total_steps), h("small", { class: "muted number" }, `${count(job.step)} / ${count(job.total_steps)}`)),
    h("td", { class: "number" }, job.eta_seconds === null ? "" : duration(job.eta_seconds)),
    h("td", { class: "number" }, spark(job.spark), job.loss === null ? "" : number(job.loss)),
    h("td", { class: "right number" }, job.samples_per_second === null ? "" : count(job.samples_per_second)),
    h("td", { class: "number muted" }, when(job.created)),
    h("td", { class: "reason", title: job.reason }, job.reason));
}

export function showJobs(main) {
  document.title = "Jobs · steepest";
  const chosen = { search: "", group: recall("group", "all"), sort: "created", down: false };
  let jobs = null;

  const search = h("input", { type: "search", placeholder: "Search by name or reason", "aria-label": "Search jobs" });
  search.addEventListener("input", () => { chosen.search = search.value.toLowerCase(); draw(); });
  const groups = Object.keys(GROUPS).map((name) => h("button", {
    type: "button",
    onclick: () => { chosen.group = name; remember("group", name); draw(); },
  }, name));
  const body = h("tbody");
  const heads = COLUMNS.map(([name, title]) => h("th", { scope: "col", class: name === "speed" ? "right" : null }, h("button", {
    type: "button",
    onclick: () => { chosen.down = chosen.sort === name && !chosen.down; chosen.sort = name; draw(); },
  }, title)));
  const empty = h("p", { class: "empty" });
  main.replaceChildren(
    h("h1", {}, "Training jobs"),
    h("div", { class: "tools" }, search, ...groups),
    h("div", { class: "card scroll" }, h("table", { class: "jobs" }, h("thead", {}, h("tr", {}, heads)), body), empty));

  function draw() {
    if (jobs === null) { empty.textContent = "Loading …"; return; }
    groups.forEach((button) => {
      const name = button.textContent.split(" ")[0];
      button.setAttribute("aria-pressed", String(name === chosen.group));
      button.textContent = `${name} ${jobs.filter(GROUPS[name]).length}`;
    });
    heads.forEach((head, index) => {
      const own = COLUMNS[index][0] === chosen.sort;
      if (own) head.setAttribute("aria-sort", chosen.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const key = COLUMNS.find(([name]) => name === chosen.sort)[2];
    const shown = jobs
      .filter((job) => GROUPS[chosen.group](job) && `${job.id} ${job.reason} ${job.state}`.toLowerCase().includes(chosen.search))
      .sort((a, b) => { const x = key(a), y = key(b); return (x < y ? -1 : x > y ? 1 : 0) * (chosen.down ? -1 : 1); });
    body.replaceChildren(...shown.map(row));
    empty.textContent = shown.length ? "" : jobs.length
      ? "No job fits. Change the search or the filter."
      : "No jobs yet. Submit one: steepest submit train.py:task --epochs 10";
  }

  draw();
  const source = new EventSource("/api/live");
  source.onmessage = (event) => { jobs = JSON.parse(event.data); connection("live"); draw(); };
  source.onerror = () => connection("reconnecting …", true);
  return () => { source.close(); connection(""); };
}
