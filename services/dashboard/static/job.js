// One job: is it healthy, how long yet, what is it waiting for; its curves, its layers, its steps, its words.
import { Chart, Series } from "./charts.js";
import { FUNCTION_SIGNALS, HeatMap, SIGNALS, TITLES } from "./heatmap.js";
import { Histogram } from "./histogram.js";
import { bytes, clock, connection, count, duration, get, h, number, pill, post, progress, recall, remember, toast, when } from "./util.js";

const CHARTS = [
  { id: "loss", title: "Loss", lines: [["loss", "training", 1]] },
  { id: "norm", title: "Gradient norm", lines: [["gradient_norm", "before the clip", 1], ["clipped_norm", "after the clip", 2]] },
  { id: "lr", title: "Learning rate", lines: [["lr", "learning rate", 3]] },
  { id: "time", title: "Seconds of a step", lines: [["step_seconds", "step", 1], ["data_seconds", "waiting for data", 2], ["compute_seconds", "workers", 3], ["reduce_seconds", "reduce", 4], ["apply_seconds", "apply", 5]] },
];
const ENDED = ["SUCCEEDED", "FAILED", "CANCELLED"];
const VERBS = {
  pause: (state) => state === "RUNNING",
  resume: (state) => state === "PAUSED" || state === "PAUSING",
  scale: (state) => !ENDED.includes(state) && state !== "CANCELLING",
  cancel: (state) => !ENDED.includes(state) && state !== "CANCELLING",
};
const HEAT_SECONDS = 4, MOST_LINES = 1000;

function fact(title, value) {
  return h("div", {}, h("dt", {}, title), h("dd", {}, value));
}

function ask(title, text, yes, extra = null) {
  return new Promise((resolve) => {
    const form = h("form", { method: "dialog" },
      h("h2", {}, title), h("p", {}, text), extra,
      h("div", { class: "tools" },
        h("button", { type: "submit", value: "no" }, "Leave it"),
        h("button", { type: "submit", value: "yes", class: "primary" }, yes)));
    const dialog = h("dialog", { "aria-label": title }, form);
    dialog.addEventListener("close", () => { resolve(dialog.returnValue === "yes"); dialog.remove(); });
    document.body.append(dialog);
    dialog.showModal();
  });
}

function flat(value, path = "", found = []) {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    for (const [key, inner] of Object.entries(value)) flat(inner, path ? `${path}.${key}` : key, found);
  } else found.push([path, JSON.stringify(value)]);
  return found;
}

export function showJob(main, id) {
  document.title = `${id} · steepest`;
  main.replaceChildren(h("p", { class: "loading" }, "Loading …"));
  const closers = [];
  let closed = false;
  open().catch((error) => {
    if (closed) return;
    main.replaceChildren(h("div", { class: "empty" }, h("h1", {}, "This job cannot be shown"), h("p", {}, error.message), h("p", {}, h("a", { href: "/" }, "All jobs"))));
  });

  async function open() {
    const path = `/api/jobs/${encodeURIComponent(id)}`;
    const about = await get(path);
    if (closed) return;
    const settings = recall("charts", { log: false, smoothing: 0 });
    const logged = about.logged.map((name) => `logged.${name}`);
    const names = [...new Set([...CHARTS.flatMap((chart) => chart.lines.map(([name]) => name)), ...logged])];
    const series = new Series(id, names);
    let others = [];
    let job = about.job;

    // -- the headline ----------------------------------------------------------------------------------------------
    const headline = h("section", { class: "card", "aria-label": "State of the job" });
    const buttons = Object.fromEntries(Object.keys(VERBS).map((verb) => [verb, h("button", {
      type: "button", class: verb === "cancel" ? "danger" : null, onclick: () => steer(verb),
    }, verb[0].toUpperCase() + verb.slice(1))]));

    async function steer(verb) {
      try {
        if (verb === "cancel" && !await ask("Cancel this job?", "It stops at the next step boundary and keeps a checkpoint. It cannot be resumed.", "Cancel the job")) return;
        if (verb === "scale") {
          const input = h("input", { type: "number", min: 1, max: 1024, value: job.wanted_workers, "aria-label": "Number of workers", autofocus: true });
          if (!await ask("How many workers?", "The result stays the same, bit for bit.", "Scale", input)) return;
          await post(`${path}/scale`, { workers: Number(input.value) });
        } else await post(`${path}/${verb}`);
        toast(`${verb} was requested`);
      } catch (error) { toast(error.message, true); }
    }

    function drawHeadline() {
      const shares = job.shares;
      const ended = ENDED.includes(job.state);
      const seconds = (job.ended ?? Date.now() / 1000) - job.created;
      for (const [verb, allowed] of Object.entries(VERBS)) buttons[verb].disabled = !allowed(job.state);
      headline.replaceChildren(
        h("div", { class: "headline" }, h("h1", {}, id), pill(job.state), h("span", { class: "grow" }), ...(ended ? [] : Object.values(buttons))),
        h("p", { class: "reason-line" }, job.reason),
        progress(job.step, job.total_steps),
        h("dl", { class: "facts" },
          fact("Step", `${count(job.step)} / ${count(job.total_steps)}`),
          fact(ended ? "Took" : "Time left", ended ? duration(seconds) : duration(job.eta_seconds)),
          fact("Loss", number(job.loss)),
          ...Object.entries(job.metrics).map(([name, value]) => fact(`Evaluation: ${name}`, number(value))),
          fact("Samples/s", count(job.samples_per_second)),
          fact("Workers", `${job.workers.filter((w) => w.state === "running").length} of ${job.wanted_workers}`),
          about.micro_batch_bytes ? fact("Memory of a pass", bytes(about.micro_batch_bytes)) : null,
          fact("A step takes", shares ? duration(shares.step_seconds) : "–"),
          fact("It is", shares ? shares.word : "–")),
        job.error ? h("pre", { class: "error-box", tabindex: 0 }, job.error) : "");
      document.title = `${job.state === "RUNNING" ? `${Math.floor((100 * job.step) / job.total_steps)} % · ` : ""}${id} · steepest`;
    }

    // -- findings --------------------------------------------------------------------------------------------------
    const findings = h("section", { class: "card", hidden: true, "aria-label": "Findings" });

    function drawFindings() {
      findings.hidden = !job.findings.length;
      findings.replaceChildren(h("header", {}, h("h2", {}, "Findings")), h("ul", { class: "findings" }, job.findings.slice().reverse().map((each) => {
        const where = [`step ${count(each.step)}`, each.worker, each.micro_batch === null ? null : `micro-batch ${each.micro_batch}`].filter(Boolean).join(" · ");
        return h("li", {}, h("b", { class: each.severity }, each.rule.replace("_", " ")), h("span", { class: "muted" }, where),
          each.layer && isKnown(each.layer) ? h("button", { type: "button", class: "quiet", onclick: () => openLayer(each.layer) }, each.layer) : null,
          h("div", {}, each.message));
      })));
    }

    // -- charts ----------------------------------------------------------------------------------------------------
    const grid = h("div", { class: "grid" });
    const charts = CHARTS.concat(logged.length ? [{ id: "logged", title: "Beside the loss", lines: logged.map((name, index) => [name, name.slice(7), 1 + (index % 5)]) }] : [])
      .map((chart) => {
        const holder = h("div", { class: "chart", "data-chart": chart.id });
        const made = new Chart(holder, chart.lines, { settings, linear: chart.id === "time" }, zoom);
        closers.push(() => made.destroy());
        grid.append(h("section", { class: "card span-6", "aria-label": chart.title }, h("header", {}, h("h2", {}, chart.title)), holder));
        return made;
      });
    const drawCharts = () => charts.forEach((chart) => chart.draw(series, others));

    async function zoom(first, last) {
      series.first = first; series.last = last;
      for (const other of others) { other.first = first; other.last = last; }
      back.hidden = last === null;
      await Promise.all([series, ...others].map((each) => each.read()));
      await Promise.all([heat.read(first, last), readNoise(), readCurvature()]);
      drawCharts();
    }

    const back = h("button", { type: "button", hidden: true, onclick: () => zoom(0, null) }, "All steps");
    const log = h("button", { type: "button", "aria-pressed": String(settings.log), onclick: () => {
      settings.log = !settings.log; log.setAttribute("aria-pressed", String(settings.log)); remember("charts", settings); drawCharts();
    } }, "Log scale");
    const smoothing = h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: settings.smoothing, "aria-label": "Smoothing" });
    smoothing.addEventListener("input", () => { settings.smoothing = Number(smoothing.value); remember("charts", settings); drawCharts(); });
    const compare = h("select", { "aria-label": "Compare with another job" }, h("option", { value: "" }, "Compare with …"));
    compare.addEventListener("change", async () => {
      others = [];
      if (compare.value) {
        const other = new Series(compare.value, names.filter((name) => !name.startsWith("logged.")));
        other.first = series.first; other.last = series.last;
        try { await other.read(); others = [other]; } catch (error) { toast(error.message, true); }
      }
      drawCharts();
      drawSpec();
    });
    get("/api/jobs").then((all) => compare.append(...all.jobs.filter((each) => each.id !== id).slice(0, 200).map((each) => h("option", { value: each.id }, each.id)))).catch(() => {});

    // -- layers ----------------------------------------------------------------------------------------------------
    const heatHolder = h("div");
    const layerHolder = h("div", { class: "chart", hidden: true });
    const layerTitle = h("h2", { tabindex: -1 });
    const histogramHolder = h("div", { hidden: true });
    const histogram = new Histogram(histogramHolder, id);
    let layerChart = null, layerName = null;
    const heat = new HeatMap(heatHolder, id, openLayer);
    closers.push(() => heat.destroy(), () => layerChart && layerChart.destroy());

    const isFunction = (name) => about.activations.includes(name);
    const isKnown = (name) => isFunction(name) || about.parameters.some((one) => one.name === name);

    async function openLayer(name) {
      layerName = name;
      if (isFunction(name) !== (heat.signal in FUNCTION_SIGNALS)) {
        heat.signal = signal.value = isFunction(name) ? "activation_share" : "gradient_norm";
        await heat.read(series.first, series.last);
      }
      const range = series.last === null ? `first=${series.first}` : `first=${series.first}&last=${series.last}`;
      const found = await get(`${path}/layers?name=${encodeURIComponent(name)}&signal=${heat.signal}&${range}`);
      layerHolder.hidden = false;
      layerTitle.textContent = `${TITLES[heat.signal]} of ${name}`;
      layerChart ??= new Chart(layerHolder, [["norm", "", 1]], { settings, height: 220 }, zoom);
      layerChart.lines = [["norm", TITLES[heat.signal], 1]];
      layerChart.draw({ steps: found.steps, values: { norm: found } });
      histogramHolder.hidden = heat.signal in FUNCTION_SIGNALS;
      if (!histogramHolder.hidden) await histogram.read(name, range);
      layerTitle.scrollIntoView({ block: "nearest" });
    }

    function closeLayer() {
      layerName = null;
      layerTitle.textContent = "";
      layerHolder.hidden = histogramHolder.hidden = true;
    }

    const signal = h("select", { "aria-label": "Signal of the layers" }, Object.entries(about.activations.length ? TITLES : SIGNALS).map(([name, text]) => h("option", { value: name }, text)));
    signal.addEventListener("change", async () => {
      heat.signal = signal.value;
      try {
        await heat.read(series.first, series.last);
        if (layerName && heat.found.names.includes(layerName)) await openLayer(layerName);
        else closeLayer();
      } catch (error) { toast(error.message, true); }
    });
    const layers = h("datalist", { id: "layers" }, [...about.parameters.map((one) => one.name), ...about.activations].map((name) => h("option", { value: name })));
    const layer = h("input", { type: "search", list: "layers", placeholder: "Open a layer …", "aria-label": "Open a layer by its name" });
    layer.addEventListener("change", () => {
      if (isKnown(layer.value)) openLayer(layer.value);
      else if (layer.value) toast(`${layer.value} is no parameter or activation function of this job`, true);
    });
    const noiseHolder = h("div", { class: "chart", "data-chart": "noise" });
    const noiseChart = new Chart(noiseHolder, [["noise", "tr(Σ) / ‖G‖², in samples", 2]], { settings, height: 220 }, zoom);
    const cosineHolder = h("div", { class: "chart", "data-chart": "cosine" });
    const cosineChart = new Chart(cosineHolder, [["cosine", "E[g·h] / E‖g‖²", 1]], { settings, height: 220 }, zoom);
    closers.push(() => noiseChart.destroy(), () => cosineChart.destroy());
    const cosineCard = h("section", { class: "card span-6", hidden: true, "aria-label": "Cosine between micro-batches" },
      h("header", {}, h("h2", {}, "Cosine between micro-batches")),
      h("p", { class: "muted" }, "1: all say the same, and a smaller batch would do; 0: each is mostly noise, and a larger batch helps."), cosineHolder);
    const noiseCard = h("section", { class: "card span-6", hidden: true, "aria-label": "Gradient noise scale" },
      h("header", {}, h("h2", {}, "Gradient noise scale")),
      h("p", { class: "muted" }, "Batches much smaller than this average noise away almost for nothing; much larger ones bring little more."), noiseHolder);

    async function readNoise() {
      const range = series.last === null ? `first=${series.first}` : `first=${series.first}&last=${series.last}`;
      const found = await get(`${path}/noise?${range}`);
      const { steps, noise, cosine } = found;
      noiseCard.hidden = !noise.mean.some((value) => value !== null);
      if (!noiseCard.hidden) noiseChart.draw({ steps, values: { noise } });
      cosineCard.hidden = !cosine.mean.some((value) => value !== null);
      if (!cosineCard.hidden) cosineChart.draw({ steps, values: { cosine } });
    }

    const curvatureHolder = h("div", { class: "chart", "data-chart": "curvature" });
    const isSgd = ["sgd", "momentum", "nesterov"].includes(about.spec.optimizer.name);
    const curvatureLines = [["sharpness", "sharpness", 1], ["smallest_eigenvalue", "smallest eigenvalue", 2]].concat(isSgd ? [["stable", "stable up to", 4]] : []);
    const curvatureChart = new Chart(curvatureHolder, curvatureLines, { settings, linear: true, height: 220 }, zoom);
    closers.push(() => curvatureChart.destroy());
    const curvatureCard = h("section", { class: "card span-6", hidden: true, "aria-label": "Curvature of the loss" },
      h("header", {}, h("h2", {}, "Curvature of the loss")),
      h("p", { class: "muted" }, `The extreme eigenvalues of the Hessian in the first micro-batch.${isSgd ? " A sharpness that stays above what is stable makes the loss jump: a smaller learning rate helps." : ""}`), curvatureHolder);

    async function readCurvature() {
      if (!about.spec.telemetry.curvature_every) return;
      const range = series.last === null ? `first=${series.first}` : `first=${series.first}&last=${series.last}`;
      const { steps, ...values } = await get(`${path}/curvature?${range}`);
      curvatureCard.hidden = !steps.length;
      if (steps.length) curvatureChart.draw({ steps, values });
    }

    grid.append(
      h("section", { class: "card span-12", "aria-label": "Gradients of all layers" }, h("header", {}, h("h2", {}, "Gradients of all layers"), h("span", { class: "grow" }), layers, layer, signal), heatHolder, layerTitle, layerHolder, histogramHolder),
      noiseCard, cosineCard, curvatureCard);

    // -- where the time goes, processes, events, log ---------------------------------------------------------------
    const shares = h("div");
    const processes = h("tbody");
    const events = h("ul", { class: "events", tabindex: 0, "aria-label": "Events, newest first" });
    const words = h("pre", { class: "log", tabindex: 0, "aria-label": "What the task's code printed" });
    const evaluations = h("tbody");
    const saved = h("tbody");
    const spec = h("tbody");
    const table = (heads, body, kind = "") => h("div", { class: "scroll" }, h("table", { class: kind }, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), body));
    grid.append(
      h("section", { class: "card span-6" }, h("header", {}, h("h2", {}, "Where a step's time goes")), shares),
      h("section", { class: "card span-6" }, h("header", {}, h("h2", {}, "Workers and servers")), table(["Process", "State", "Host", "Pid"], processes)),
      h("section", { class: "card span-6" }, h("header", {}, h("h2", {}, "Events")), events),
      h("section", { class: "card span-6" }, h("header", {}, h("h2", {}, "Log")), words),
      h("section", { class: "card span-6" }, h("header", {}, h("h2", {}, "Evaluations")), table(["Step", "Metrics"], evaluations)),
      h("section", { class: "card span-6" }, h("header", {}, h("h2", {}, "Checkpoints")), table(["Step", "Size", "Written"], saved)),
      h("section", { class: "card span-12" }, h("header", {}, h("h2", {}, "Spec")), h("p", { class: "muted" }, "Bold: not the default."), table(["Field", "This job"], spec, "spec")));

    function drawRest() {
      const found = job.shares;
      const parts = [["data", "waiting for data"], ["compute", "forward and backward"], ["straggler", "waiting for the slowest worker"], ["network", "messages"], ["reduce", "reduce"], ["apply", "optimizer step"]];
      if (found) {
        const bar = h("div", { class: "shares", role: "img", "aria-label": parts.map(([key, text]) => `${text} ${Math.round(100 * found[key])} %`).join(", ") });
        for (const [key] of parts) { const part = h("i", { class: `c-${key}` }); part.style.width = `${100 * found[key]}%`; bar.append(part); }
        const without = found.word === "compute-bound" ? "With a worker more" : "Without what holds it up";
        const saves = ` ${without}, a step would be ${Math.round(100 * found.saves_seconds / found.step_seconds)} % shorter: ${found.remedy}.`;
        shares.replaceChildren(bar, h("ul", { class: "legend" }, parts.map(([key, text]) => h("li", {}, h("b", { class: `c-${key}` }), `${text} ${(100 * found[key]).toFixed(0)} %`))),
          h("p", { class: "muted" }, `The last steps took ${duration(found.step_seconds)} each; the job is ${found.word}.${saves}`));
      } else shares.replaceChildren(h("p", { class: "empty" }, "No step yet."));
      if (ENDED.includes(job.state)) processes.replaceChildren(h("tr", {}, h("td", { colspan: 4, class: "muted" }, "The job has ended, and its processes with it.")));
      else processes.replaceChildren(...[...job.workers, ...job.servers].map((member) => h("tr", {}, h("td", { class: "name" }, member.id), h("td", {}, member.state), h("td", {}, member.host), h("td", { class: "number" }, member.pid || "–"))));
    }

    function drawEvaluations(found) {
      evaluations.replaceChildren(...(found.length ? found.slice(-50).reverse().map((each) => h("tr", {},
        h("td", { class: "number" }, count(each.step), each.step === about.result.best_step ? " (best)" : ""),
        h("td", { class: "number" }, Object.entries(each.metrics).map(([name, value]) => `${name} ${number(value)}`).join("   "))))
        : [h("tr", {}, h("td", { colspan: 2, class: "muted" }, "None yet."))]));
    }

    function drawSaved(found) {
      saved.replaceChildren(...(found.length ? found.map((each) => h("tr", {}, h("td", { class: "number" }, count(each.step)), h("td", { class: "number" }, bytes(each.bytes)), h("td", { class: "number" }, when(each.time))))
        : [h("tr", {}, h("td", { colspan: 3, class: "muted" }, "None yet."))]));
    }

    async function drawSpec() {
      const defaults = new Map(flat(about.defaults));
      let other = null;
      specHeads.replaceChildren(...["Field", "This job", ...(compare.value ? [compare.value] : [])].map((head) => h("th", { scope: "col" }, head)));
      if (compare.value) other = new Map(flat((await get(`/api/jobs/${encodeURIComponent(compare.value)}`)).spec));
      spec.replaceChildren(...flat(about.spec).map(([name, value]) => {
        const theirs = other ? other.get(name) ?? "" : "";
        const kinds = [defaults.get(name) !== value ? "given" : "", other && theirs !== value ? "differs" : ""].join(" ").trim();
        return h("tr", { class: kinds || null }, h("td", {}, name), h("td", {}, value), other ? h("td", {}, theirs) : null);
      }));
    }

    const specHeads = spec.parentElement.querySelector("thead tr");
    main.replaceChildren(headline, h("div", { class: "tools", role: "toolbar", "aria-label": "Charts" }, back, log, h("label", { class: "muted" }, "Smoothing ", smoothing), compare), grid);
    headline.after(findings);
    drawHeadline(); drawFindings(); drawRest(); drawEvaluations(about.evaluations); drawSaved(about.checkpoints); drawSpec();
    await Promise.all([series.read().then(() => closed || drawCharts()), heat.read(), readNoise(), readCurvature()]);
    if (closed) return;
    const redraw = () => { drawCharts(); heat.draw(); if (layerName) openLayer(layerName); };
    document.addEventListener("theme", redraw);
    closers.push(() => document.removeEventListener("theme", redraw));

    // -- live ------------------------------------------------------------------------------------------------------
    const next = series.steps.length ? job.step : 0;
    const source = new EventSource(`${path}/live?cursor=${next}:0:0`);
    closers.push(() => source.close());
    let heatRead = Date.now(), lastLine = null;
    source.onmessage = async (message) => {
      const news = JSON.parse(message.data);
      connection(ENDED.includes(news.job.state) ? "" : "live");
      const changed = news.job.step !== job.step || news.job.state !== job.state;
      job = news.job;
      drawHeadline(); drawFindings(); drawRest(); drawEvaluations(news.evaluations);
      for (const event of news.events) events.prepend(h("li", {}, h("time", {}, clock(event.time)), h("span", {}, h("b", { class: event.state }, event.state.toLowerCase()), ` ${event.reason}`)));
      if (news.lines.length) {
        const atEnd = words.scrollTop + words.clientHeight >= words.scrollHeight - 8;
        for (const line of news.lines) words.append(lastLine = h("div", {}, h("b", {}, `${line.process} `), line.text));
        while (words.childElementCount > MOST_LINES) words.firstElementChild.remove();
        if (atEnd) words.scrollTop = words.scrollHeight;
      }
      if (!lastLine) words.textContent = "Nothing was printed.";
      else if (words.firstChild.nodeType === Node.TEXT_NODE) words.firstChild.remove();
      if (news.records.length && series.last === null) {
        if (series.add(news.records)) await series.read();
        drawCharts();
      }
      if (changed && Date.now() - heatRead > HEAT_SECONDS * 1000 && series.last === null) refresh();
    };
    async function refresh() {
      heatRead = Date.now();
      const [now] = await Promise.all([get(path), heat.read(series.first, series.last), readNoise(), readCurvature()]);
      Object.assign(about, now);
      drawSaved(now.checkpoints);
      if (layerName) openLayer(layerName);
    }
    source.addEventListener("end", () => { source.close(); connection(""); refresh(); });
    source.onerror = () => { if (source.readyState !== EventSource.CLOSED) connection("reconnecting …", true); };
  }

  return () => { closed = true; closers.forEach((close) => close()); connection(""); };
}
