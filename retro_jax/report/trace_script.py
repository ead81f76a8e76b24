"""The style and the script of a page with traces: no library, nothing from elsewhere.

The script shows the figures of the token that is pointed at, focused or tapped, and CCA's attention
from it over the neighbours; where the page is served it sends prompts and adds the answers.
"""

STYLE = """
:root { --rise: 86, 160, 255; --fall: 255, 150, 50; --look: 150, 90, 230; --line: #1d4fb8; --deep: 0.85; }
@media (prefers-color-scheme: dark) {
  :root { --rise: 40, 108, 214; --fall: 176, 92, 8; --look: 132, 84, 214; --line: #9cc2ff; }
}
html { scroll-padding: 24px 0 38vh; }
body { padding-bottom: 30vh; }
.alone .pair { grid-template-columns: minmax(0, 1fr); }
main { max-width: 1180px; }
main, .details { overflow-wrap: anywhere; }
.trace .continuation { color: inherit; }
.trace .continuation::before, .legend .continues::before { content: "\\2506"; color: var(--accent); font-weight: 700; }
.neighbour > .caption { display: grid; grid-template-columns: max-content minmax(0, 1fr); align-items: start; }
.trace + .trace { border-top: 1px solid var(--rule); margin-top: 40px; }
.trace > header { margin-top: 26px; }
.trace > header h2 { margin: 0 0 6px; overflow-wrap: anywhere; }
.legend { gap: 6px 16px; margin: 10px 0 14px; }
.legend .ramp { display: inline-block; background: linear-gradient(90deg, rgba(var(--fall), var(--deep)), rgba(var(--fall), 0) 50%,
  rgba(var(--rise), 0) 50%, rgba(var(--rise), var(--deep))); }
.legend .sample { font: 12.5px ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; color: var(--text);
  padding: 0 3px; }
.u { border-radius: 2px; cursor: pointer; -webkit-tap-highlight-color: transparent; }
.u:focus, .u.chosen { outline: 2px solid var(--text); outline-offset: 1px; }
.u.pinned { outline-style: double; outline-width: 4px; }
.shared { border-bottom: 1px solid var(--line); }
.copied { border-bottom: 3px solid var(--line); }
.fallen { text-decoration: underline dotted; text-underline-offset: 3px; }
.label { font-size: 10.5px; border: 1px solid var(--dim); border-radius: 4px; padding: 0 4px; color: var(--text); }
.prompt-end { border-left: 3px solid var(--accent); margin: 0 3px; }
.caption b { unicode-bidi: isolate; }
.number { display: inline-block; min-width: 1.5em; text-align: center; border-radius: 9px; font-weight: 700;
  background: var(--code); color: var(--text); margin-right: 6px; }
.neighbour.blamed > .caption .number { background: var(--text); color: var(--card); }
.neighbour.blamed > .text { outline: 2px solid var(--text); }
.details { position: fixed; inset: auto 0 0 0; max-height: 36vh; overflow: auto; background: var(--card);
  border-top: 2px solid var(--text); box-shadow: 0 -6px 24px rgba(0, 0, 0, 0.16); padding: 10px 24px 10px; }
.details[hidden] { display: none; }
.details .inner { max-width: 1132px; margin: 0 auto; display: grid; gap: 6px 30px;
  grid-template-columns: minmax(0, 5fr) minmax(0, 6fr) minmax(0, 6fr); font-size: 13.5px; }
.details h3 { font-size: 12.5px; color: var(--dim); font-weight: 600; margin: 0 0 3px; }
.details p { margin: 2px 0 5px; overflow-wrap: anywhere; }
.details code { background: var(--code); border-radius: 4px; padding: 1px 5px; white-space: pre-wrap; }
.details b { unicode-bidi: isolate; }
.details .big { font-size: 19px; font-weight: 600; font-variant-numeric: tabular-nums; }
.details .row { display: grid; grid-template-columns: max-content 84px max-content 1fr; gap: 8px; align-items: center;
  font-variant-numeric: tabular-nums; }
.details .row .document { color: var(--dim); overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  unicode-bidi: isolate; }
.bar { position: relative; height: 12px; background: var(--code); border-radius: 2px; }
.bar i { position: absolute; top: 0; bottom: 0; }
.bar i.up { left: 50%; background: rgb(var(--rise)); } .bar i.down { right: 50%; background: rgb(var(--fall)); }
.bar::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px; border-left: 1px solid var(--dim); }
.details button, .ask button { font: inherit; color: inherit; background: var(--code);
  border: 1px solid var(--dim); border-radius: 6px; padding: 2px 9px; cursor: pointer; }
.details button[aria-pressed=true] { background: var(--text); color: var(--card); }
.details .close { position: absolute; top: 8px; right: 14px; }
.ask { display: grid; gap: 10px; }
.ask textarea { width: 100%; min-height: 92px; resize: vertical; font: 13px/1.5 ui-monospace, Menlo, Consolas,
  "Liberation Mono", monospace; }
.ask textarea, .ask input { color: inherit; background: var(--code); border: 1px solid var(--dim);
  border-radius: 6px; padding: 7px 9px; }
.ask .row { display: flex; flex-wrap: wrap; gap: 10px 18px; align-items: center; }
.ask input[type=number] { width: 84px; font: inherit; }
.ask button { padding: 7px 18px; background: var(--accent); color: var(--page); border-color: var(--accent);
  font-weight: 600; }
.ask button:disabled { opacity: 0.55; cursor: progress; }
.ask .status { min-height: 1.5em; margin: 0; }
.ask .status.bad { color: var(--second); font-weight: 600; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (min-width: 761px) { .chunk .pair > :first-child { position: sticky; top: 14px; align-self: start; } }
@media (max-width: 760px) {
  main { padding: 20px 14px 60px; }
  .card { padding: 12px 12px; }
  .details { padding: 10px 14px 12px; }
  .details .inner { grid-template-columns: minmax(0, 1fr); }
  .details .row { grid-template-columns: max-content 60px max-content minmax(0, 1fr); }
}
""" + "\n".join(
    f".{name}{step} {{ background: rgba(var(--{colour}), {0.85 * step / 8:.3f}); }}"
    for name, colour in (("r", "rise"), ("f", "fall"))
    for step in range(1, 9)
)

SCRIPT = r"""
(() => {
"use strict";
const panel = document.getElementById("details");
const state = { unit: null, pinned: false, layer: 0, lit: [] };

const element = (name, text, kind) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const signed = (nats) => (nats < 0 ? "\u2212" : "+") + Math.abs(nats).toFixed(2);
const percent = (share) => {
  const value = 100 * share;
  return (value >= 10 ? value.toFixed(0) : value.toPrecision(2)) + "%";
};

const traces = new WeakMap();  // article -> its values
const valuesOf = (article) => {
  if (!traces.has(article)) {
    traces.set(article, JSON.parse(article.querySelector("script.values").textContent));
  }
  return traces.get(article);
};
const unitsOf = (article) => article.units || (article.units = [...article.querySelectorAll(".u")]);

const attentionOf = (values, layer, token) => {
  const attention = values.attention;
  if (!attention || token < attention.first) return null;
  attention.bytes = attention.bytes || [];
  if (!attention.bytes[layer]) {
    attention.bytes[layer] = Uint8Array.from(atob(attention.data[layer]), (c) => c.charCodeAt(0));
  }
  const [, k, length] = attention.shape;
  const row = token - attention.first;
  const bytes = attention.bytes[layer].subarray(row * k * length, (row + 1) * k * length);
  return { bytes, length, peak: attention.peaks[layer][row] };
};

const clear = () => {
  for (const one of state.lit) one.style.backgroundColor = "";
  state.lit = [];
  for (const one of document.querySelectorAll(".blamed")) one.classList.remove("blamed");
  if (state.unit) state.unit.classList.remove("chosen", "pinned");
};

const light = (unit, value, values) => {
  const neighbours = [...unit.closest(".chunk").querySelectorAll(".neighbour")];
  const read = attentionOf(values, state.layer, value.token);
  let best = null;
  for (const neighbour of neighbours) {
    const slot = Number(neighbour.dataset.n);
    neighbour.classList.toggle("blamed", slot === value.responsible);
    if (!read) continue;
    for (const token of neighbour.querySelectorAll("[data-t]")) {
      const weight = read.bytes[slot * read.length + Number(token.dataset.t)];
      if (!weight) continue;
      token.style.backgroundColor = `rgba(var(--look), ${(0.8 * weight / 255).toFixed(3)})`;
      state.lit.push(token);
      if (!best || weight > best.weight) best = { weight, token, slot };
    }
  }
  return read && best ? { ...best, share: (read.peak * best.weight) / 255 } : null;
};

const figures = (unit, value) => {
  const box = element("div");
  const change = value.with - value.without;
  const head = element("p");
  head.append(element("code", unit.textContent.replace(/\n/g, "\u21b5")));
  head.append(` token ${value.token + 1}` + (value.tokens > 1 ? `, ${value.tokens} tokens of one character` : ""));
  box.append(element("h3", "Token"), head);
  if (!value.token) { box.append(element("p", "The first token: nothing predicts it.")); return box; }
  if (!value.reads) {
    box.append(element("p", `Probability ${percent(Math.exp(value.with))}`, "big"));
    box.append(element("p", "No neighbours were read here.", "dim"));
    return box;
  }
  box.append(element("p", `${percent(Math.exp(value.without))} \u2192 ${percent(Math.exp(value.with))}`, "big"));
  box.append(element("p", `without and with retrieval: ${signed(change)} nats, from ` +
    `${value.without.toFixed(2)} to ${value.with.toFixed(2)}`.replace(/-/g, "\u2212"), "dim"));
  return box;
};

const effects = (value, neighbours, focus, values, redraw) => {
  const box = element("div");
  box.append(element("h3", "What each neighbour changed"));
  const largest = Math.max(0.1, ...value.effects.map(Math.abs));
  neighbours.forEach((neighbour) => {
    const slot = Number(neighbour.dataset.n), effect = value.effects[slot];
    const row = element("div", undefined, "row"), bar = element("div", undefined, "bar");
    const fill = element("i", undefined, effect < 0 ? "down" : "up");
    fill.style.width = `${(50 * Math.abs(effect)) / largest}%`;
    bar.append(fill);
    row.append(element("span", String(slot + 1), "number"), bar, element("span", `${signed(effect)} nats`));
    row.append(element("span", slot === value.responsible ? "held responsible" : "", "document"));
    box.append(row);
  });
  if (value.responsible < 0) box.append(element("p", "No single one: each changes less than 0.01 nats.", "dim"));
  if (focus) {
    const line = element("p", "CCA of layer "), layers = values.attention.layers;
    layers.forEach((layer, i) => {
      if (layers.length === 1) { line.append(`${layer} `); return; }
      const button = element("button", String(layer));
      button.type = "button";
      button.setAttribute("aria-pressed", String(i === state.layer));
      button.addEventListener("click", () => { state.layer = i; redraw(); });
      line.append(button, " ");
    });
    line.append("attends most to ", element("code", focus.token.textContent.replace(/\n/g, "\u21b5")),
      ` of neighbour ${focus.slot + 1}: ${percent(focus.share)}`);
    box.append(line);
  }
  return box;
};

const origins = (unit, value, values) => {
  const box = element("div");
  box.append(element("h3", "Where else it stands"));
  const spans = values.chunks[Number(unit.closest(".chunk").dataset.c)].spans
    .filter((span) => span.start <= value.token && value.token < span.start + span.length);
  const names = new Set();
  for (const span of spans) {
    if (names.has(span.document)) continue;
    names.add(span.document);
    const line = element("p", `${span.length} tokens in a row: `);
    line.append(element("b", span.document), ` (neighbour ${span.neighbour + 1})`);
    box.append(line);
  }
  const memory = value.memory;
  if (memory) {
    const line = element("p", `Token memory: after ${memory.length} equal token${memory.length === 1 ? "" : "s"}, ` +
      `${percent(memory.share)} of ${memory.votes} vote${memory.votes === 1 ? "" : "s"} for this one`);
    if (memory.document) line.append(": ", element("b", memory.document));
    box.append(line);
    if (memory.next.length > 1 || memory.share < 1) {
      const next = element("p", "Votes: ");
      memory.next.forEach((one) => next.append(element("code", one.text.replace(/\n/g, "\u21b5")), ` ${percent(one.share)} `));
      box.append(next);
    }
  }
  if (!spans.length && !memory) box.append(element("p", "In no neighbour, 4 tokens or more in a row.", "dim"));
  return box;
};

const show = (unit) => {
  clear();
  state.unit = unit;
  const article = unit.closest(".trace"), values = valuesOf(article);
  const value = values.units[Number(unit.dataset.u)];
  unit.classList.add("chosen");
  unit.classList.toggle("pinned", state.pinned);
  for (const other of unitsOf(article)) other.tabIndex = other === unit ? 0 : -1;
  const neighbours = [...unit.closest(".chunk").querySelectorAll(".neighbour")];
  const focus = light(unit, value, values);
  const inner = element("div", undefined, "inner");
  inner.append(figures(unit, value));
  if (neighbours.length && value.reads) {
    inner.append(effects(value, neighbours, focus, values, () => show(unit)));
  }
  inner.append(origins(unit, value, values));
  const close = element("button", "Close", "close");
  close.type = "button";
  close.addEventListener("click", hide);
  panel.replaceChildren(inner, close);
  panel.hidden = false;
};

const hide = () => { clear(); state.pinned = false; state.unit = null; panel.hidden = true; };

const move = (unit, by) => {
  const all = unitsOf(unit.closest(".trace"));
  const next = all[Math.min(all.length - 1, Math.max(0, Number(unit.dataset.u) + by))];
  next.tabIndex = 0;
  next.focus();
};

document.addEventListener("pointerover", (event) => {
  const unit = event.target.closest && event.target.closest(".u");
  if (unit && !state.pinned && event.pointerType !== "touch") show(unit);
});
document.addEventListener("focusin", (event) => {
  if (event.target.classList.contains("u")) show(event.target);
});
document.addEventListener("click", (event) => {
  const unit = event.target.closest(".u");
  if (!unit) return;
  if (state.pinned && state.unit === unit) { hide(); return; }
  state.pinned = true;
  show(unit);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { hide(); return; }
  const unit = event.target.closest && event.target.closest(".u");
  if (!unit) return;
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 };
  if (event.key in steps) move(unit, steps[event.key]);
  else if (event.key === "Enter" || event.key === " ") { state.pinned = !state.pinned; show(unit); }
  else return;
  event.preventDefault();
});

const wire = (article) => {
  const all = unitsOf(article);
  all.forEach((unit, i) => {
    unit.removeAttribute("title");
    unit.tabIndex = i ? -1 : 0;
  });
};
document.querySelectorAll(".trace").forEach((article) => wire(article));

const form = document.getElementById("ask");
if (form) {
  const status = form.querySelector(".status"), button = form.querySelector("button");
  const say = (text, bad) => { status.textContent = text; status.classList.toggle("bad", Boolean(bad)); };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    say("Writing\u2026");
    const headers = { "content-type": "application/json" };
    if (form.elements.key.value) headers.authorization = `Bearer ${form.elements.key.value}`;
    const request = {
      prompt: form.elements.prompt.value,
      max_tokens: form.elements.max_tokens.valueAsNumber,
      temperature: form.elements.temperature.valueAsNumber,
      retrieval: form.elements.retrieval.checked,
    };
    try {
      const answer = await fetch(form.dataset.endpoint, {
        method: "POST", headers, body: JSON.stringify(request),
      });
      const body = await answer.json().catch(() => ({}));
      if (answer.status === 401) form.querySelector(".key").hidden = false;
      if (!answer.ok) throw new Error((body.error && body.error.message) || `status ${answer.status}`);
      const made = document.createElement("template");
      made.innerHTML = body.html;
      const article = made.content.querySelector(".trace");
      document.getElementById("answers").prepend(article);
      hide();
      wire(article);
      say("");
    } catch (error) {
      say(`No answer: ${error.message}`, true);
    } finally {
      button.disabled = false;
    }
  });
}
})();
"""
