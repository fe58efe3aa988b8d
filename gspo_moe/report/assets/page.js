"use strict";
(() => {
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';
  const CONFIG = { responsive: true, displayModeBar: false, doubleClick: "reset" };
  const content = document.getElementById("content");
  const hidden = new Set();
  let data = JSON.parse(document.getElementById("data").textContent);
  const SHOWN = 60, ZERO_ROWS = 4;
  let sampleStep = null;

  const darkSystem = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (darkSystem.matches ? "dark" : "light")) === "dark";
  const color = (arm) => data.looks[arm][isDark() ? "dark" : "light"];
  const faint = (hex, share) => hex + Math.round(share * 255).toString(16).padStart(2, "0");
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const short = (value) => (value === null ? "?" : String(Number(value.toPrecision(4))));
  const interval = (low, high) => (low === null ? "" : ` [${short(low)}, ${short(high)}]`);
  const seeds = (count) => `${count} seed${count === 1 ? "" : "s"}`;
  const format = (unit) => (unit === "fraction" ? "~%" : "~g");

  function layout(panel, more) {
    const ink = isDark() ? "#c6ccd3" : "#3c444d";
    const grid = isDark() ? "#30363e" : "#e7e9ec";
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, tickfont: { size: 12 } };
    const touch = matchMedia("(pointer: coarse)").matches;
    return {
      paper_bgcolor: isDark() ? "#1c2026" : "#ffffff", plot_bgcolor: isDark() ? "#1c2026" : "#ffffff", showlegend: false,
      font: { family: FONT, size: 12, color: ink }, margin: { l: 44, r: 10, t: 8, b: 38 },
      dragmode: touch ? false : "zoom",
      hoverlabel: { bgcolor: isDark() ? "#262b32" : "#ffffff", bordercolor: grid, font: { family: FONT, size: 12, color: ink } },
      ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
      ...(more.xaxis2 ? { xaxis2: { ...axis, ...more.xaxis2 } } : {}),
    };
  }

  function whiskers(curve, stroke) {
    const above = curve.x.map((_, i) => (curve.low[i] === null ? 0 : curve.high[i] - curve.mean[i]));
    const below = curve.x.map((_, i) => (curve.low[i] === null ? 0 : curve.mean[i] - curve.low[i]));
    return { type: "data", symmetric: false, array: above, arrayminus: below, color: stroke, thickness: 1.6, width: 4 };
  }

  function lineTraces(panel, foot) {
    const traces = [];
    const shown = panel.curves.filter((entry) => !hidden.has(entry.arm));
    for (const curve of shown) {
      const stroke = color(curve.arm);
      const inBand = curve.x.map((_, i) => i).filter((i) => curve.low[i] !== null && curve.mean[i] !== null && (curve.mean[i] > 0 || !panel.log));
      if (inBand.length > 1) {
        const back = inBand.toReversed();
        traces.push({
          x: [...inBand, ...back].map((i) => curve.x[i]),
          y: [...inBand.map((i) => curve.high[i]), ...back.map((i) => (panel.log ? Math.max(curve.low[i], 1e-12) : curve.low[i]))],
          fill: "toself", fillcolor: faint(stroke, 0.16), line: { width: 0 }, mode: "lines", hoverinfo: "skip",
        });
      }
      if (curve.raw && shown.length <= 3) {
        traces.push({ x: curve.x, y: panel.log ? curve.raw.map((value) => (value > 0 ? value : null)) : curve.raw, mode: "lines", line: { width: 1, color: faint(stroke, 0.3) }, hoverinfo: "skip" });
      }
      const drawn = (values) => (panel.log ? values.map((value) => (value > 0 ? value : null)) : values);
      if (panel.log && curve.zeros.length) {
        const row = zeroRows(panel.curves).indexOf(curve.arm) % ZERO_ROWS;
        traces.push({
          x: curve.zeros, y: curve.zeros.map(() => foot(row)), mode: "markers", cliponaxis: false,
          marker: { size: 8, symbol: "triangle-down-open", color: stroke, line: { width: 1.5 } },
          meta: { zeros: true }, customdata: curve.zeros.map(() => plain(curve.arm)), hovertemplate: "%{customdata}: <b>0</b><extra></extra>",
        });
      }
      // A line shows no point whose neighbours are missing.
      const y = drawn(curve.mean), missing = (i) => (y[i] ?? null) === null, lone = (i) => missing(i - 1) && missing(i + 1);
      traces.push({
        x: curve.x, y, mode: "lines+markers", connectgaps: panel.markers,
        line: { width: 2.2, color: stroke, dash: data.looks[curve.arm].dash },
        marker: { size: y.map((_, i) => (panel.markers || lone(i) ? 7 : 0)), opacity: 1, symbol: data.looks[curve.arm].marker, color: stroke, line: { width: 0 } },
        ...(inBand.length === 1 ? { error_y: whiskers(curve, stroke) } : {}),
        customdata: curve.x.map((_, i) => [plain(curve.arm), interval(curve.low[i], curve.high[i]), seeds(curve.seeds[i])]),
        hovertemplate: "%{customdata[0]}: <b>%{y:.4~g}</b>%{customdata[1]}, %{customdata[2]}<extra></extra>",
        meta: { arm: curve.arm, spoken: true },
      });
    }
    for (const floor of panel.floors.filter((entry) => !hidden.has(entry.arm))) {
      traces.push({
        x: floor.x, y: floor.mean, mode: "lines", line: { width: 1.6, color: color(floor.arm), dash: "dot" },
        customdata: floor.x.map(() => plain(floor.arm)),
        hovertemplate: "%{customdata}, noise floor: <b>%{y:.4~g}</b><extra></extra>",
      });
    }
    return traces;
  }

  const zeroRows = (curves) => curves.filter((curve) => curve.zeros.length).map((curve) => curve.arm);

  // Zeros stand below all other values, each arm's in a row of its own as far as there is room.
  function logAxis(panel, panels) {
    const values = panels.flatMap((panel) => panel.curves.flatMap((curve) => [...curve.mean, ...curve.low, ...curve.high, ...(curve.raw ?? [])]));
    const logs = values.filter((value) => value > 0).map(Math.log10);
    const low = logs.reduce((a, b) => Math.min(a, b), Infinity), high = logs.reduce((a, b) => Math.max(a, b), -Infinity);
    const room = Math.max(0.05, (high - low) * 0.05);
    const rows = Math.max(...panels.map((entry) => Math.min(ZERO_ROWS, zeroRows(entry.curves).length)));
    const bottom = low - room - (rows > 1 ? (rows - 1) * room : 0);
    const steps = high - low > 2.5 ? [1] : high - low > 0.7 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    const tickvals = [];
    for (let power = Math.floor(bottom); power <= high + room; power++) tickvals.push(...steps.map((step) => step * 10 ** power));
    const percent = (value) => `${short(100 * value)}%`;
    return {
      type: "log", range: [bottom, high + room], foot: (row) => 10 ** (bottom + row * room), tickvals,
      ticktext: tickvals.map((value) => (panel.unit === "fraction" ? percent(value) : short(value))),
    };
  }

  function line(panel, figure) {
    const { foot, ...logarithmic } = panel.log ? logAxis(panel, figure.shared_y ? figure.panels : [panel]) : {};
    const y = panel.log
      ? { ...logarithmic, hoverformat: format(panel.unit) }
      : { tickformat: format(panel.unit), rangemode: "tozero", nticks: 6 };
    const places = [...new Set(panel.curves.flatMap((curve) => (panel.doublings ? curve.x : [curve.x[0], curve.x.at(-1)])))];
    const first = Math.min(...places), last = Math.max(...places), edge = (last - first || 1) * 0.02;
    const steps = { range: [first - edge, last + edge], ...(last - first < 8 ? { dtick: 1 } : {}) };
    const doublings = { type: "log", tickvals: places, ticktext: places.map(String), range: [Math.log10(first) - 0.08, Math.log10(last) + 0.08] };
    const named = panel.ticks.length ? { tickvals: panel.ticks.map((_, place) => place), ticktext: panel.ticks, tickangle: -30, range: [-0.2, panel.ticks.length - 0.8], unifiedhovertitle: { text: "%{x}" } } : {};
    const x = {
      title: { text: panel.x_label, font: { size: 12 }, standoff: 6 }, nticks: 7, zeroline: false,
      unifiedhovertitle: { text: `${panel.x_label} %{x}` }, spikethickness: 1, spikedash: "dot", spikecolor: isDark() ? "#8b949e" : "#6b737c",
      ...(panel.doublings ? doublings : steps), ...named,
    };
    return [lineTraces(panel, foot), layout(panel, { xaxis: x, yaxis: y, hovermode: "x unified" })];
  }

  function heat(panel) {
    const layers = panel.layers.map(Number);
    const tick = format(panel.unit);
    const traces = [{
      type: "heatmap", x: panel.x, y: layers, z: panel.values_LS, coloraxis: "coloraxis",
      customdata: layers.map(() => panel.columns),
      hovertemplate: `layer %{y}, ${panel.x_label} %{customdata}: <b>%{z:.4~g}</b><extra></extra>`,
    }];
    const more = {
      coloraxis: {
        cmin: 0, cmax: panel.top, colorscale: "Cividis",
        colorbar: { thickness: 10, outlinewidth: 0, tickformat: tick, nticks: 5, tickfont: { size: 11 }, xpad: 6 },
      },
      xaxis: { title: { text: panel.x_label, font: { size: 12 }, standoff: 6 }, nticks: 6, showgrid: false },
      yaxis: { title: { text: "layer", font: { size: 12 }, standoff: 2 }, dtick: Math.ceil(layers.length / 8), tick0: layers[0], showgrid: false, zeroline: false },
    };
    if (panel.floor_L) {
      traces.push({
        type: "heatmap", x: [0], y: layers, z: panel.floor_L.map((value) => [value]), coloraxis: "coloraxis", xaxis: "x2",
        hovertemplate: "layer %{y}, noise floor: <b>%{z:.4~g}</b><extra></extra>",
      });
      more.xaxis.domain = [0.1, 1];
      Object.assign(more.yaxis, { anchor: "free", position: 0 });
      more.xaxis2 = { domain: [0, 0.06], tickvals: [0], ticktext: ["floor"], showgrid: false, zeroline: false };
    }
    return [traces, layout(panel, more)];
  }

  function dots(panel) {
    const rows = panel.dots.filter((row) => !hidden.has(row.arm)).toReversed();
    const traces = rows.flatMap((row) => {
      const stroke = color(row.arm), label = plain(row.label);
      const known = row.low !== null;
      return [
        {
          x: row.values, y: row.values.map(() => label), mode: "markers", hoverinfo: "skip",
          marker: { size: 6, color: faint(stroke, 0.45), symbol: data.looks[row.arm].marker },
        },
        {
          x: [row.mean], y: [label], mode: "markers", marker: { size: 11, color: stroke, symbol: data.looks[row.arm].marker },
          error_x: known ? { type: "data", symmetric: false, array: [row.high - row.mean], arrayminus: [row.mean - row.low], color: stroke, thickness: 2.2, width: 5 } : {},
          customdata: [[interval(row.low, row.high), seeds(row.values.length)]],
          hovertemplate: "%{y}: <b>%{x:.4~g}</b>%{customdata[0]}, %{customdata[1]}<extra></extra>",
          meta: { spoken: true },
        },
      ];
    });
    const mark = { type: "line", xref: "x", yref: "paper", x0: panel.reference, x1: panel.reference, y0: 0, y1: 1, line: { width: 1.5, dash: "dash", color: isDark() ? "#8b949e" : "#6b737c" } };
    const more = {
      xaxis: { tickformat: format(panel.unit), nticks: 6 },
      yaxis: { type: "category", showgrid: false, range: [-0.6, rows.length - 0.4] }, hovermode: "closest",
      shapes: panel.reference === null ? [] : [mark],
    };
    if (rows.length) {
      const ends = [...(panel.reference === null ? [] : [panel.reference]), ...rows.flatMap((row) => [...row.values, row.low ?? row.mean, row.high ?? row.mean])];
      const low = Math.min(...ends), high = Math.max(...ends), room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.01;
      more.xaxis.range = [low - room, high + room];
    }
    return [traces, layout(panel, more)];
  }

  async function draw(node) {
    const figure = data.figures.find((entry) => entry.key === node.dataset.figure);
    const panel = figure.panels[Number(node.dataset.panel)];
    const plot = node.querySelector(".plot");
    node.hidden = panel.kind === "heat" && hidden.has(panel.arm);
    if (node.hidden) return;
    if (panel.kind === "heat") plot.style.height = `${Math.min(420, 110 + 16 * panel.layers.length)}px`;
    if (panel.kind === "dot") plot.style.height = `${70 + 34 * panel.dots.length}px`;
    const [traces, shape] = { line, heat, dot: dots }[panel.kind](panel, figure);
    await Plotly.react(plot, traces, shape, CONFIG);
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `${figure.title}: ${panel.title}. ${panel.kind === "heat" ? "" : "Arrow keys read its values."}`);
    if (panel.kind !== "heat") plot.tabIndex = 0;
    plot.dataset.axis = panel.x_label ?? "";
    plot.onkeydown = (event) => readAloud(event, plot);
  }

  function readAloud(event, plot) {
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 1, ArrowDown: -1 }[event.key];
    const curves = plot.data.map((trace, number) => [trace, number]).filter(([trace]) => trace.meta?.spoken);
    if (!move || !curves.length) return;
    event.preventDefault();
    const places = Math.max(...curves.map(([trace]) => trace.x.length));
    const dotted = curves.every(([trace]) => trace.x.length === 1) && curves.length > 1;
    const span = dotted ? curves.length : places;
    const at = ((Number(plot.dataset.at ?? (move > 0 ? -1 : 0)) + move) % span + span) % span;
    plot.dataset.at = at;
    const chosen = dotted ? [curves[at]] : curves;
    Plotly.Fx.hover(plot, chosen.map(([trace, number]) => ({ curveNumber: number, pointNumber: dotted ? 0 : Math.min(at, trace.x.length - 1) })));
    const place = dotted ? [] : [`${plot.dataset.axis} ${chosen[0][0].x[Math.min(at, chosen[0][0].x.length - 1)]}`];
    document.getElementById("spoken").textContent = [...place, ...[...plot.querySelectorAll(".hoverlayer text")].map((text) => text.textContent)].join("; ");
  }

  async function drawAll() {
    await globalThis.plotlyReady;
    for (const node of content.querySelectorAll(".panel")) {
      await draw(node);
      await new Promise((resolve) => setTimeout(resolve));
    }
    drawSamples();
    document.documentElement.dataset.drawn = content.querySelectorAll(".panel").length;
  }

  const bySteps = () => [...new Set(Object.values(data.samples).flat().map((sample) => sample.step))].sort((a, b) => a - b);
  const bound = (id, otherwise) => (document.getElementById(id).value === "" ? otherwise : Number(document.getElementById(id).value));

  function drawSamples() {
    const slider = document.getElementById("sample-slider");
    if (!slider) return;
    const steps = bySteps();
    slider.max = steps.length - 1;
    const at = sampleStep === null ? steps.length - 1 : Math.max(0, steps.findLastIndex((step) => step <= sampleStep));
    slider.value = at;
    slider.disabled = document.getElementById("sample-all").checked;
    slider.setAttribute("aria-valuetext", `step ${steps[at]}`);
    document.getElementById("sample-step").textContent = slider.disabled ? "all" : steps[at];
    const low = bound("reward-low", -Infinity), high = bound("reward-high", Infinity), free = low === -Infinity && high === Infinity;
    const fits = (sample) => free || (typeof sample.reward === "number" && low <= sample.reward && sample.reward <= high);
    let found = 0, shown = 0;
    const groups = Object.keys(data.samples).filter((arm) => !hidden.has(arm)).map((arm) => {
      // An arm without samples at this step shows its newest before it.
      const own = Math.max(...data.samples[arm].map((sample) => sample.step).filter((step) => step <= steps[at]));
      const samples = data.samples[arm].filter((sample) => (slider.disabled || sample.step === own) && fits(sample));
      const cards = samples.slice(0, Math.max(0, SHOWN - shown));
      [found, shown] = [found + samples.length, shown + cards.length];
      const group = element("div", "", "rollouts");
      group.append(...(cards.length ? cards.map(rollout) : [element("p", samples.length ? "see the arms before it, or ask for fewer" : "no sample kept that fits", "caption")]));
      return [element("h3", `${arm}${samples.length ? `, seed ${samples[0].seed}` : ""}`), group];
    });
    document.getElementById("sample-count").textContent = shown < found ? `${shown} of ${found} shown` : `${found} shown`;
    document.getElementById("rollouts").replaceChildren(...groups.flat());
  }

  function rollout(sample) {
    const card = element("article", "", "rollout");
    const number = (value) => (typeof value === "number" ? short(value) : "not recorded");
    const parts = Object.entries(sample.parts).map(([name, value]) => `${name} ${number(value)}`);
    const head = element("p", "", "score");
    head.append(element("b", `reward ${number(sample.reward)}`), parts.length ? ` (${parts.join(", ")})` : "");
    const rest = [`advantage ${number(sample.advantage)}`, `step ${sample.step}`, sample.uid, sample.end].filter(Boolean);
    card.append(head, element("p", rest.join(", "), "label"));
    for (const { role, text } of sample.said) {
      const row = element("div", "", `said ${role === "policy" || role === "assistant" ? "own" : ""}`);
      row.append(element("p", role, "label"), element("pre", text));
      card.append(row);
    }
    if (sample.error) {
      const row = element("div", "", "said failed");
      row.append(element("p", "reward error", "label"), element("pre", sample.error));
      card.append(row);
    }
    return card;
  }

  function element(tag, text = "", className = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = className;
    return made;
  }

  function markButtons() {
    for (const button of content.querySelectorAll("[data-arm]")) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.arm)));
  }

  content.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.arm !== undefined) {
      const arm = button.dataset.arm;
      hidden.has(arm) ? hidden.delete(arm) : hidden.add(arm);
      markButtons();
      drawAll();
    } else if (button?.id === "all-arms") {
      const arms = Object.keys(data.looks);
      hidden.size ? hidden.clear() : arms.forEach((arm) => hidden.add(arm));
      markButtons();
      drawAll();
    } else if (button?.id === "theme") {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      drawAll();
    }
  });
  content.addEventListener("input", (event) => {
    if (event.target.id === "sample-slider") {
      const steps = bySteps();
      sampleStep = Number(event.target.value) === steps.length - 1 ? null : steps[Number(event.target.value)];
    }
    if (event.target.closest(".filters")) drawSamples();
  });
  darkSystem.addEventListener("change", drawAll);

  async function watch(address) {
    let version = "";
    for (;;) {
      try {
        const answer = await fetch(`${address}?version=${version}`);
        const parts = await answer.json();
        if (parts.version !== version) {
          version = parts.version;
          replace(parts);
        }
        document.getElementById("news").textContent = parts.problem || `Watching; last change seen at ${new Date().toLocaleTimeString()}.`;
      } catch {
        document.getElementById("news").textContent = "The report server has ended; this is the last state.";
      }
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }

  function replace(parts) {
    if (!parts.body) return;
    const open = [...content.querySelectorAll("details[open]")].map((entry) => entry.id);
    const place = scrollY;
    const kept = [...content.querySelectorAll(".filters input")].map((entry) => [entry.id, entry.value, entry.checked]);
    content.innerHTML = parts.body;
    for (const [id, value, checked] of kept) {
      const entry = document.getElementById(id);
      if (entry) [entry.value, entry.checked] = [value, checked];
    }
    data = parts.data;
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    markButtons();
    scrollTo(0, place);
    drawAll();
  }

  if (matchMedia("(min-width: 40.01rem)").matches) document.getElementById("contents").open = true;
  drawAll().then(() => document.body.dataset.watch && watch(document.body.dataset.watch));
})();
