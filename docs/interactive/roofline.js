"use strict";
// The least time of a linear layer with an adapter, term by term: lora_core/plan/roofline.py.
const roofline = (() => {
  const PATHS = ["dense", "nf4 fused", "nf4 dequantised"];

  function packedBytes(elements) {
    const blocks = Math.ceil(elements / 64);
    return Math.floor((elements + 1) / 2) + blocks + 4 * (Math.ceil(blocks / 256) + 1);
  }

  /** The rate of products in a dtype: float32 does without tensor cores. */
  const tflops = (gpu, dtype) => (dtype === "float32" ? gpu.float32_tflop_s : gpu.matmul_tflop_s);

  function terms({ m, n, k, rank, gpu, memoryShare, matmulShare, dtype }, path) {
    const element = dtype === "float32" ? 4 : 2;
    const dense = element * n * k, packed = packedBytes(n * k);
    const memoryRate = gpu.memory_gb_s * 1e9 * memoryShare, matmulRate = tflops(gpu, dtype) * 1e12 * matmulShare;
    const weight = path === "nf4 fused" ? packed : dense, activations = element * m * (k + n), adapter = element * rank * (n + k);
    const base = 2 * m * n * k, lowRank = 2 * m * rank * (n + k);
    const memory = (weight + activations + adapter) / memoryRate, compute = (base + lowRank) / matmulRate;
    const before = path === "nf4 dequantised" ? (packed + dense) / memoryRate : 0;
    return {
      weight, activations, adapter, base, lowRank, memory, compute, before, memoryRate, matmulRate,
      total: before + Math.max(memory, compute),
      binds: memory >= compute ? "memory" : "compute",
      intensity: (base + lowRank) / (weight + activations + adapter),
    };
  }

  return { PATHS, terms, tflops };
})();

(() => {
  const NAMES = { dense: "", "nf4 fused": "NF4, decoded inside", "nf4 dequantised": "NF4, dequantised first" };
  const COLOURS = { dense: "--vermilion", "nf4 fused": "--blue", "nf4 dequantised": "--green" };
  const MOST = 14;
  DATA.gpus.forEach((gpu) => page.find("gpu").add(new Option(gpu.name, gpu.name)));
  for (const id of ["n", "k"]) page.find(id).addEventListener("input", () => { page.find("layer").value = "own"; });
  page.find("layer").addEventListener("input", () => {
    const [n, k] = page.find("layer").value.split(" ");
    if (k) { page.find("n").value = n; page.find("k").value = k; }
  });

  const rankOf = (step) => (step ? 2 ** (step - 1) : 0);

  function show(v) {
    const gpu = DATA.gpus.find((each) => each.name === v.gpu);
    const n = page.size("n", 1e6), k = page.size("k", 1e6);
    const setting = { m: 2 ** v.m, n: n.used, k: k.used, rank: rankOf(v.rank), gpu, memoryShare: v.memory / 100, matmulShare: v.matmul / 100, dtype: v.dtype };
    // a dense W goes by its dtype
    NAMES.dense = v.dtype;
    const found = roofline.PATHS.map((path) => ({ path, ...roofline.terms(setting, path) }));
    page.say({ note: [n.said, k.said].filter(Boolean).join(" ") });
    bars(found);
    curve(setting);
    table(found);
    page.find("rates").textContent = `${gpu.name}: ${page.whole(gpu.memory_gb_s)} GB/s and ${roofline.tflops(gpu, v.dtype)} TFLOP/s in ${v.dtype} (${gpu.source}).`;
    return found.map((t) => `${NAMES[t.path]}: ${page.time(t.total)}, bound by ${t.binds}`).join("; ") + ".";
  }

  function bars(found) {
    const svg = page.find("times");
    svg.replaceChildren();
    const left = 4, scale = 540 / Math.max(...found.map((t) => t.total));
    found.forEach((t, i) => {
      const y = 25 + 74 * i, start = left + t.before * scale;
      page.draw(svg, "text", { x: left, y: y - 5 }, NAMES[t.path]);
      if (t.before) page.draw(page.draw(svg, "rect", { x: left, y, width: t.before * scale, height: 46, fill: "var(--grey)" }), "title", {}, `dequantise: ${page.time(t.before)}`);
      for (const [j, [name, seconds, parts]] of [
        ["memory", t.memory, [["weight", t.weight, "--blue"], ["activations", t.activations, "--sky"], ["adapter", t.adapter, "--orange"]]],
        ["compute", t.compute, [["base", t.base, "--vermilion"], ["adapter", t.lowRank, "--orange"]]],
      ].entries()) {
        let x = start;
        const rate = name === "memory" ? t.memoryRate : t.matmulRate;
        for (const [part, amount, colour] of parts) {
          const bar = page.draw(svg, "rect", { x, y: y + 24 * j, width: (amount / rate) * scale, height: 22, fill: `var(${colour})`, opacity: name === t.binds ? 1 : 0.45 });
          page.draw(bar, "title", {}, `${name}, ${part}: ${page.time(amount / rate)} of ${page.time(seconds)}`);
          x += (amount / rate) * scale;
        }
      }
      page.draw(svg, "text", { x: left + 6 + t.total * scale, y: y + 26 }, page.time(t.total));
    });
    page.draw(svg, "text", { x: left, y: 244, class: "soft" }, "upper half: bytes; lower half: operations; the paler one waits");
  }

  function curve(setting) {
    const svg = page.find("curve");
    svg.replaceChildren();
    const at = (path, step) => roofline.terms({ ...setting, m: 2 ** step }, path).total;
    const all = roofline.PATHS.flatMap((path) => [at(path, 0), at(path, MOST)]);
    const low = Math.log10(Math.min(...all)) - 0.1, high = Math.log10(Math.max(...all)) + 0.1;
    const x = (step) => 80 + (520 * step) / MOST, y = (seconds) => 260 - (240 * (Math.log10(seconds) - low)) / (high - low);
    for (let power = Math.ceil(low); power <= high; power++) {
      page.draw(svg, "line", { x1: 80, x2: 600, y1: y(10 ** power), y2: y(10 ** power), class: "axis" });
      page.draw(svg, "text", { x: 74, y: y(10 ** power) + 4, "text-anchor": "end", class: "soft" }, page.time(10 ** power));
    }
    for (let step = 0; step <= MOST; step += 2) page.draw(svg, "text", { x: x(step), y: 278, "text-anchor": "middle", class: "soft" }, page.whole(2 ** step));
    page.draw(svg, "text", { x: 340, y: 298, "text-anchor": "middle", class: "soft" }, "tokens M");
    for (const [i, path] of roofline.PATHS.entries()) {
      const points = Array.from({ length: 4 * MOST + 1 }, (_, j) => `${x(j / 4)},${y(at(path, j / 4))}`).join(" ");
      page.draw(svg, "polyline", { points, fill: "none", stroke: `var(${COLOURS[path]})`, "stroke-width": 2.5, "stroke-dasharray": ["", "7 4", "2 3"][i] });
      page.draw(svg, "text", { x: 92, y: 28 + 20 * i, style: `fill: var(${COLOURS[path]})` }, NAMES[path]);
    }
    const now = Math.log2(setting.m);
    page.draw(svg, "line", { x1: x(now), x2: x(now), y1: 14, y2: 260, stroke: "var(--soft)", "stroke-dasharray": "3 4" });
  }

  function table(found) {
    const lines = [
      ["", ...found.map((t) => NAMES[t.path])],
      ["weight, bytes", ...found.map((t) => page.whole(t.weight))],
      ["activations, bytes", ...found.map((t) => page.whole(t.activations))],
      ["adapter, bytes", ...found.map((t) => page.whole(t.adapter))],
      ["base, operations", ...found.map((t) => page.whole(t.base))],
      ["adapter, operations", ...found.map((t) => page.whole(t.lowRank))],
      ["operations a byte", ...found.map((t) => t.intensity.toPrecision(4))],
      ["time of the bytes", ...found.map((t) => page.time(t.memory))],
      ["time of the operations", ...found.map((t) => page.time(t.compute))],
      ["dequantising first", ...found.map((t) => (t.before ? page.time(t.before) : "-"))],
      ["least time", ...found.map((t) => page.time(t.total))],
      ["waits for", ...found.map((t) => t.binds)],
    ];
    page.find("terms").replaceChildren(...lines.map((cells, i) => {
      const line = document.createElement("tr");
      line.append(...cells.map((text) => Object.assign(document.createElement(i ? "td" : "th"), { textContent: text })));
      return line;
    }));
  }

  page.start(show, (v) => ({ m: page.whole(2 ** v.m), rank: rankOf(v.rank), memory: `${v.memory}%`, matmul: `${v.matmul}%` }));
})();
