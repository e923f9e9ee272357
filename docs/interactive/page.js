"use strict";
// What the interactive pages share: controls that write themselves into the address, a theme, numbers and drawing.
const page = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const PAGES = { "low-rank": "low rank", lora: "LoRA", nf4: "NF4", memory: "memory", roofline: "roofline" };
  const REST_MS = 600;
  const find = (id) => document.getElementById(id);

  /** The value of a control: a number, a truth value or a text. */
  function read(control) {
    if (control.type === "checkbox") return control.checked;
    return control.type === "range" || control.type === "number" ? Number(control.value) : control.value;
  }

  function controls() {
    return [...document.querySelectorAll(".controls [id]")].filter((c) => "value" in c && c.type !== "file" && c.tagName !== "OUTPUT" && c.tagName !== "BUTTON");
  }

  /** All controls by id. */
  function values() {
    return Object.fromEntries(controls().map((control) => [control.id, read(control)]));
  }

  function restore() {
    for (const [id, value] of new URLSearchParams(location.hash.slice(1))) {
      const control = find(id);
      if (!control || !controls().includes(control)) continue;
      if (control.type === "checkbox") control.checked = value === "true";
      else if (control.tagName !== "SELECT" || [...control.options].some((o) => o.value === value)) control.value = value;
    }
  }

  /**
   * Run update(values) now and whenever a control moves; names(values) may give the texts beside the controls, and
   * limit() is asked first, to take from controls what others rule out.
   * update returns a sentence for those who hear the page instead of seeing it, spoken when the controls have come to rest.
   */
  function start(update, names = () => ({}), limit = () => {}) {
    restore();
    const refresh = () => {
      limit();
      const now = values();
      const said = { ...now, ...names(now) };
      for (const output of document.querySelectorAll("output[for]")) output.value = said[output.htmlFor.value] ?? "";
      announce(update(now));
      remember(now);
    };
    for (const control of controls()) control.addEventListener("input", refresh);
    addEventListener("hashchange", () => { restore(); refresh(); });
    links();
    theme(refresh);
    refresh();
    return refresh;
  }

  const spoken = Object.assign(document.createElement("p"), { id: "spoken", className: "unseen", role: "status" });
  document.body.append(spoken);
  let resting = 0;
  function announce(sentence) {
    clearTimeout(resting);
    resting = setTimeout(() => { spoken.textContent = sentence; }, REST_MS);
  }

  function remember(now) {
    const hash = `#${new URLSearchParams(now)}`;
    if (hash !== location.hash) history.replaceState(null, "", hash);
  }

  /** The other pages, by relative addresses: they work from a folder as well as from a server. */
  function links() {
    for (const [file, name] of Object.entries(PAGES)) {
      const link = Object.assign(document.createElement("a"), { href: `${file}.html`, textContent: name });
      if (location.pathname.endsWith(`/${file}.html`)) link.setAttribute("aria-current", "page");
      find("pages").append(link);
    }
  }

  /** Light or dark: what the system says, until the button is pressed; remembered where the browser allows. */
  function theme(refresh) {
    const system = matchMedia("(prefers-color-scheme: dark)");
    const stored = attempt(() => localStorage.getItem("lora-core-theme"));
    const set = (name) => {
      document.documentElement.dataset.theme = name;
      find("theme").textContent = name === "dark" ? "light" : "dark";
      find("theme").setAttribute("aria-label", `use the ${find("theme").textContent} theme`);
    };
    set(stored ?? (system.matches ? "dark" : "light"));
    find("theme").addEventListener("click", () => {
      const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      attempt(() => localStorage.setItem("lora-core-theme", next));
      set(next);
      refresh();
    });
  }

  function attempt(action) {
    try { return action(); } catch { return null; }
  }

  /** Put an element into an SVG. */
  function draw(parent, tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  /** A whole number from 1 to `most` from what was typed into a control, and what to say where that is not it. */
  function size(control, most) {
    const typed = find(control).value, number = Number(typed);
    const used = Math.min(most, Math.max(1, Math.round(number) || 1));
    return { used, said: number === used ? "" : `${find(control).labels[0].textContent}: ${typed === "" ? "nothing" : typed} counts as ${whole(used)}; want a whole number from 1 to ${whole(most)}.` };
  }

  /** Write numbers into the elements with these ids. */
  function say(texts) {
    for (const [id, text] of Object.entries(texts)) find(id).textContent = text;
  }

  const whole = (n) => Math.round(n).toLocaleString("en-US");
  const gb = (bytes) => `${(bytes / 1e9).toFixed(2)} GB`;
  const percent = (share, digits = 2) => `${(100 * share).toFixed(digits)}%`;
  /** Three significant digits, with a unit that fits. */
  const time = (seconds) => {
    // rounded first: 999.9 us are 1.00 ms
    const rounded = Number(seconds.toPrecision(3));
    const [scale, unit] = rounded < 1e-3 ? [1e6, "us"] : rounded < 1 ? [1e3, "ms"] : [1, "s"];
    const shown = rounded * scale;
    return `${shown < 1000 ? shown.toPrecision(3) : Math.round(shown)} ${unit}`;
  };

  /** Paint rows x columns greys of 0 to 1, or with signed a blue to vermilion scale around 0, into a canvas. */
  function paint(canvas, matrix, rows, columns, signed = false) {
    canvas.width = columns;
    canvas.height = rows;
    const image = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const x = Math.max(signed ? -1 : 0, Math.min(1, matrix[i]));
      const [r, g, b] = !signed ? [255 * x, 255 * x, 255 * x]
        : x < 0 ? [245 + x * 245, 245 + x * 131, 245 + x * 67] : [245 - x * 32, 245 - x * 151, 245 - x * 245];
      image.data.set([r, g, b, 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  return { start, values, find, draw, say, size, whole, gb, percent, time, paint };
})();
