"use strict";
// The bytes that fine-tuning holds at its peak: lora_core/plan/memory.py and activations.py, sum by sum.
const memory = (() => {
  const FP32 = 4, INT64 = 8, ADAPTER = 4, BLOCK = 64, NESTED = 256, STATE_BLOCK = 256, SMALLEST_8BIT = 4096, SEARCH_END = 2 ** 20;
  const ROWS = ["weights", "adapters", "master copy", "gradients", "optimiser states", "activations", "workspace"];
  const METHODS = ["full", "lora", "qlora"];
  const sum = (list) => list.reduce((total, x) => total + x, 0);
  const up = (a, b) => Math.ceil(a / b);

  function quantised(elements) {
    const blocks = up(elements, BLOCK);
    return Math.floor((elements + 1) / 2) + blocks + FP32 * (up(blocks, NESTED) + 1);
  }

  function targets(m, names) {
    if (names === "all-linear") return m.linears;
    const wanted = names === "attention" ? ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"] : names.split(" ");
    return m.linears.filter((layer) => wanted.includes(layer.name));
  }

  function perToken(m, s) {
    const full = s.method === "full", c = s.bytes, d = m.hidden, f = m.intermediate;
    const trained = (full ? m.linears : targets(m, s.targets)).map((layer) => layer.name);
    const norm = m.biases ? c * d + 2 * FP32 : FP32 * (d + 1) + (full ? c * d : 0);
    const input = (width, ...names) => (names.some((name) => trained.includes(name)) ? c * width : 0);
    const block = 2 * norm + input(d, "q_proj", "k_proj", "v_proj", "qkv_proj") + 2 * c * m.query_width + 2 * c * m.kv_width
      + FP32 * m.heads + input(d, "gate_proj", "up_proj") + (m.gated ? 3 : 1) * c * f + input(f, "down_proj")
      + (full ? 0 : trained.length * s.rank * ADAPTER);
    const ends = (full ? INT64 : 0) + norm + (full ? c * d : 0) + FP32 * m.vocabulary + INT64;
    return { block, ends };
  }

  function workspace(m, s, block) {
    const c = s.bytes, full = s.method === "full";
    const start = s.tokens * m.vocabulary * (c + 2 * FP32) + (full ? c * m.vocabulary * m.hidden : 0);
    let inside = s.tokens * c * ((m.gated ? 3 : 2) * m.intermediate + 2 * m.hidden);
    if (!full && ADAPTER !== c) inside += s.tokens * ADAPTER * m.intermediate;
    if (s.method !== "lora") inside += c * Math.max(...m.linears.map((layer) => layer.rows * layer.columns));
    if (s.checkpointing) inside += s.tokens * block;
    return Math.max(start, inside - s.tokens * FP32 * m.vocabulary);
  }

  function state8(elements) {
    return elements < SMALLEST_8BIT ? FP32 * elements : elements + FP32 * up(elements, STATE_BLOCK);
  }

  function states8(m, s) {
    if (s.method !== "full") return sum(targets(m, s.targets).map((layer) => m.layers * (state8(s.rank * layer.rows) + state8(s.rank * layer.columns))));
    const linears = sum(m.linears.map((layer) => m.layers * state8(layer.rows * layer.columns)));
    const biases = sum(m.linears.filter((layer) => layer.bias).map((layer) => m.layers * state8(layer.rows)));
    const norms = (2 * m.layers + 1) * (m.biases ? 2 : 1) * state8(m.hidden);
    const positions = m.positions ? state8(m.positions * m.hidden) : 0;
    return linears + biases + norms + (m.tied ? 1 : 2) * state8(m.vocabulary * m.hidden) + positions;
  }

  /** Bytes by row; settings: method, rank, targets, batch, sequence, dtype, optimizer, checkpointing. */
  function plan(m, settings) {
    const s = { ...settings, bytes: settings.dtype === "float32" ? 4 : 2, tokens: settings.batch * settings.sequence };
    const full = s.method === "full";
    const trained = full ? m.parameters : m.layers * sum(targets(m, s.targets).map((layer) => s.rank * (layer.rows + layer.columns)));
    const weights = s.method !== "qlora" ? s.bytes * m.parameters
      : m.layers * sum(m.linears.map((layer) => quantised(layer.rows * layer.columns))) + s.bytes * (m.parameters - m.linear_weights);
    const { block, ends } = perToken(m, s);
    const optimiser = { adamw: 2 * FP32 * trained, adamw_8bit: 2 * (s.optimizer === "adamw_8bit" ? states8(m, s) : 0), sgd: 0 }[s.optimizer];
    const rows = [
      weights,
      full ? 0 : ADAPTER * trained,
      full && s.bytes < FP32 ? FP32 * trained : 0,
      (full ? s.bytes : ADAPTER) * trained,
      optimiser,
      s.tokens * (m.layers * (s.checkpointing ? s.bytes * m.hidden : block) + ends),
      workspace(m, s, block),
    ];
    return { trained, rows, total: sum(rows) };
  }

  /** The largest n up to end for which holds(n), 0 if none; from one of falls to the next true up to some n. */
  function largest(holds, end, falls = []) {
    let high = end + 1;
    for (const start of [1, ...falls.filter((n) => n > 1 && n <= end)].sort((a, b) => b - a)) {
      let low = start - 1;
      while (high - low > 1) {
        const middle = Math.floor((low + high) / 2);
        if (holds(middle)) low = middle; else high = middle;
      }
      if (low >= start) return low;
      high = start;
    }
    return 0;
  }

  /** The largest rank and batch that fit a budget in bytes, all else equal. */
  function fit(m, s, budget) {
    const holds = (change) => plan(m, { ...s, ...change }).total <= budget;
    // at these ranks a matrix is large enough for 8-bit states, and takes less than one row fewer does
    const falls = targets(m, s.targets).flatMap((layer) => [up(SMALLEST_8BIT, layer.rows), up(SMALLEST_8BIT, layer.columns)]);
    const widest = Math.max(...targets(m, s.targets).map((layer) => Math.min(layer.rows, layer.columns)));
    return {
      fits: holds({}),
      rank: s.method === "full" ? null : largest((rank) => holds({ rank }), widest, falls),
      batch: largest((batch) => holds({ batch }), SEARCH_END),
      sequence: largest((sequence) => holds({ sequence }), m.positions || SEARCH_END),
    };
  }

  return { ROWS, METHODS, plan, fit };
})();

(() => {
  const NAMES = { full: "full", lora: "LoRA", qlora: "QLoRA" };
  const COLOURS = ["--blue", "--orange", "--purple", "--sky", "--green", "--vermilion", "--grey"];
  const CARDS = [24, 40, 80, 141];
  const LONGEST = page.find("sequence").max;
  for (const m of DATA.models) page.find("model").add(new Option(m.name, m.name, m.name === "Llama-3-8B", m.name === "Llama-3-8B"));

  const settings = (v) => ({ ...v, rank: 2 ** v.rank, sequence: 2 ** v.sequence });

  /** Leave only layers that the model has, and sequences that it has positions for. */
  function limit() {
    const m = DATA.models.find((each) => each.name === page.find("model").value), adapted = page.find("targets");
    for (const option of adapted.options) {
      option.disabled = option.value.endsWith("_proj") && option.value.split(" ").some((name) => m.linears.every((layer) => layer.name !== name));
    }
    if (adapted.selectedOptions[0].disabled) adapted.value = "attention";
    page.find("sequence").max = m.positions ? Math.floor(Math.log2(m.positions)) : LONGEST;
  }

  function show(v) {
    const m = DATA.models.find((each) => each.name === v.model);
    const plans = memory.METHODS.map((method) => ({ method, ...memory.plan(m, { ...settings(v), method }) }));
    bars(plans);
    rows(plans);
    fits(m, v, plans);
    return plans.map((plan) => `${NAMES[plan.method]} takes ${page.gb(plan.total)}`).join(", ") + ".";
  }

  function bars(plans) {
    const svg = page.find("bars");
    svg.replaceChildren();
    const right = 1.25 * Math.max(...plans.map((plan) => plan.total)), x = (bytes) => 70 + (560 * bytes) / right;
    const shown = CARDS.filter((card) => card * 1e9 < right);
    for (const size of shown) {
      page.draw(svg, "line", { x1: x(size * 1e9), x2: x(size * 1e9), y1: 10, y2: 225, stroke: "var(--soft)", "stroke-dasharray": "3 4" });
      page.draw(svg, "text", { x: Math.min(x(size * 1e9), 606), y: 242, "text-anchor": "middle", class: "soft" }, size === shown.at(-1) ? `${size} GB` : size);
    }
    plans.forEach((plan, i) => {
      const y = 20 + 70 * i;
      page.draw(svg, "text", { x: 62, y: y + 28, "text-anchor": "end" }, NAMES[plan.method]);
      let start = 0;
      plan.rows.forEach((bytes, j) => {
        const bar = page.draw(svg, "rect", { x: x(start), y, width: Math.max(0, x(start + bytes) - x(start)), height: 46, fill: `var(${COLOURS[j]})` });
        page.draw(bar, "title", {}, `${memory.ROWS[j]}: ${page.gb(bytes)}`);
        start += bytes;
      });
      page.draw(svg, "text", { x: x(start) + 6, y: y + 28 }, page.gb(plan.total));
    });
    page.find("legend").replaceChildren(...memory.ROWS.map((name, j) => {
      const item = document.createElement("span"), swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = `var(${COLOURS[j]})`;
      item.append(swatch, `${name}   `);
      item.style.display = "inline-block";
      item.style.marginRight = "1rem";
      return item;
    }));
  }

  function table(id, lines) {
    page.find(id).replaceChildren(...lines.map((cells, i) => {
      const line = document.createElement("tr");
      line.append(...cells.map((text) => Object.assign(document.createElement(i ? "td" : "th"), { textContent: text })));
      return line;
    }));
  }

  function rows(plans) {
    const line = (name, pick) => [name, ...plans.map((plan) => page.whole(pick(plan)))];
    table("rows", [
      ["bytes", ...plans.map((plan) => NAMES[plan.method])],
      ...memory.ROWS.map((name, j) => line(name, (plan) => plan.rows[j])),
      line("all", (plan) => plan.total),
      line("trained parameters", (plan) => plan.trained),
    ]);
  }

  function fits(m, v, plans) {
    table("fits", [
      ["card", ...plans.map((plan) => NAMES[plan.method])],
      ...CARDS.map((size) => [`${size} GB`, ...plans.map(({ method }) => {
        const found = memory.fit(m, { ...settings(v), method }, size * 1e9);
        const most = { rank: found.rank, batch: found.batch, sequence: found.sequence };
        const said = Object.entries(most).filter(([, size]) => size).map(([name, size]) => `${name} ${page.whole(size)}`);
        return found.fits ? `fits; at most ${said.join(", or ")}` : said.length ? `no; ${said.join(", or ")} would` : "no";
      })]),
    ]);
  }

  page.start(show, (v) => ({ rank: 2 ** v.rank, sequence: page.whole(2 ** v.sequence) }), limit);
})();
