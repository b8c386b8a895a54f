"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const OWN = "own"; // the choice of a question of one's own
const DEFAULT = "default"; // the choice of the run's usual questions
// Of a feature's picture, from dark to bright.
const RAMP = [[23, 18, 60], [92, 38, 134], [186, 62, 112], [245, 130, 68], [252, 225, 120]];

let about = null;
let clip = null; // {part, name, truth, subtitle as it is shown} of what is asked about
let choices = 0; // clips that were chosen; of two that are fetched, the later one counts
let asking = null; // aborts what is being answered
let chosen = 0; // number of the wheel that is shown

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function show(id, visible = true) {
  $(id).hidden = !visible;
}

async function json(url, options) {
  const response = await fetch(url, options);
  const found = await response.json().catch(() => null);
  if (!response.ok) throw new Error(found?.error?.message ?? `${url}: status ${response.status}`);
  return found;
}

function problem(error) {
  show("result");
  show("problem");
  const lost = error instanceof TypeError; // what fetch throws without a connection
  $("problem").textContent = lost ? "The server does not answer any more." : error.message;
}

function clearResult() {
  asking?.abort();
  for (const id of ["problem", "truth", "wheel", "result"]) show(id, false);
  $("answers").replaceChildren();
}

// --- choosing a clip -----------------------------------------------------------------------------

async function search() {
  const found = await json(`/records?contains=${encodeURIComponent($("search").value)}`);
  const shown = found.names.length;
  $("count").textContent =
    shown < found.total ? `the first ${shown} of ${found.total.toLocaleString("en")}` : `${found.total}`;
  $("names").replaceChildren(
    ...found.names.map((name) => {
      const button = element("button", { type: "button", onclick: () => pick(name) }, element("bdi", { textContent: name }));
      if (name === clip?.part?.name) button.setAttribute("aria-current", "true");
      return element("li", {}, button);
    }),
  );
  return found.names;
}

function markName(name) {
  for (const button of $("names").querySelectorAll("button")) {
    if (button.textContent === name) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

async function pick(name) {
  const mine = ++choices;
  clearResult();
  try {
    const record = await json(`/record?name=${encodeURIComponent(name)}`);
    if (mine !== choices) return;
    clearResult(); // of what was asked meanwhile, about the clip before
    clip = { part: { type: "record", name }, name, subtitle: record.subtitle, truth: record.truth };
    showClip();
    showFeatures(record.features, "the record keeps features, no pictures or sound");
    markName(name);
  } catch (error) {
    if (mine !== choices) return;
    $("go").disabled = !clip?.part; // what is shown still can be asked about
    problem(error);
  }
}

async function upload(file) {
  const mine = ++choices;
  clearResult();
  markName(null);
  const kind = file.type.split("/")[0];
  clip = { part: null, name: file.name, subtitle: "", truth: null };
  showClip();
  if (kind !== "video" && kind !== "audio") {
    problem(new Error(`${file.name} is ${file.type || "of an unknown type"}; expected a video or a recording`));
    return;
  }
  if (file.size > about.upload_bytes) {
    const mib = (bytes) => `${Math.ceil(bytes / 2 ** 20)} MiB`;
    problem(new Error(`${file.name} has ${mib(file.size)}; the limit is ${mib(about.upload_bytes)}`));
    return;
  }
  const player = element(kind, { controls: true, src: URL.createObjectURL(file), preload: "metadata" });
  player.setAttribute("aria-label", file.name);
  player.onerror = () => player.remove(); // a format that the browser does not play
  $("player").replaceChildren(player);
  $("seen").replaceChildren(element("p", { className: "note", textContent: "Looking for faces and listening…" }));
  try {
    const seen = await json("/clips", { method: "POST", headers: { "content-type": file.type }, body: file });
    if (mine !== choices) return;
    clip.part = { type: "clip", id: seen.clip };
    $("go").disabled = false;
    showSeen(seen);
  } catch (error) {
    if (mine !== choices) return;
    $("seen").replaceChildren();
    problem(error);
  }
}

// --- what the model is given ---------------------------------------------------------------------

function showClip() {
  show("clip");
  show("notes", false);
  for (const player of $("player").children) URL.revokeObjectURL(player.src);
  $("player").replaceChildren();
  $("seen").replaceChildren();
  $("name").textContent = clip.name;
  $("subtitle").value = clip.subtitle;
  clip.subtitle = $("subtitle").value; // whose line ends are its own
  $("go").disabled = !clip.part;
  $("clip").scrollIntoView({ block: "nearest" });
}

function strip(title, detail, content) {
  const heading = element("h3", {}, `${title} `, element("span", { textContent: detail }));
  return element("div", { className: "strip" }, heading, content);
}

function showFeatures(features, why) {
  const strips = Object.entries(features).map(([name, feature]) => {
    const [frames, width] = feature.shape;
    return strip(name, `${frames} × ${width} features`, heat(name, feature));
  });
  $("seen").replaceChildren(...strips);
  if (why) note(strips.length ? `What the model is given: ${why}.` : "The record has no features of face or voice.");
}

function heat(name, feature) {
  const [frames] = feature.shape;
  const canvas = element("canvas", { width: feature.columns, height: frames });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `features of ${name}, a row per frame`);
  const bytes = Uint8Array.from(atob(feature.pixels), (c) => c.charCodeAt(0));
  const image = new ImageData(feature.columns, frames);
  bytes.forEach((value, i) => {
    const place = (value / 255) * (RAMP.length - 1);
    const low = Math.min(Math.floor(place), RAMP.length - 2);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = RAMP[low][c] + (place - low) * (RAMP[low + 1][c] - RAMP[low][c]);
    image.data[4 * i + 3] = 255;
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function showSeen(seen) {
  const parts = [];
  for (const [name, urls] of Object.entries(seen.pictures)) {
    const images = urls.map((src, i) => element("img", { src, alt: `${name} ${i + 1} of ${urls.length}` }));
    parts.push(strip(name, name === "face" ? "as the encoder sees it" : "", element("div", { className: "images" }, ...images)));
  }
  if (seen.sound) parts.push(strip("sound", `${seen.sound.length} windows that the encoder hears`, wave(seen.sound)));
  $("seen").replaceChildren(...parts);
  const facts = Object.entries(seen.facts).map(([name, value]) => `${name}: ${value}`);
  note([...facts, ...seen.notes].join("; "));
}

function wave(windows) {
  const all = windows.flat();
  const top = Math.max(...all, 0.01);
  const y = (value, sign) => (50 - (sign * 48 * value) / top).toFixed(1);
  const upper = all.map((value, i) => `${i},${y(value, 1)}`);
  const lower = all.map((value, i) => `${i},${y(value, -1)}`).reverse();
  const drawing = svg("svg", { class: "wave", viewBox: `0 0 ${all.length} 100`, preserveAspectRatio: "none", role: "img", "aria-label": "loudness over time" });
  drawing.append(svg("path", { d: `M${[...upper, ...lower].join("L")}Z` }));
  for (let i = 1; i < windows.length; i++) {
    const x = i * windows[0].length;
    drawing.append(svg("line", { x1: x, x2: x, y1: 0, y2: 100 }));
  }
  return drawing;
}

function note(text) {
  $("notes").textContent = text;
  show("notes", Boolean(text));
}

// --- asking --------------------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(question, signal) {
  const title = question.length > 60 ? `${question.slice(0, 60)}…` : question;
  const text = element("p", { dir: "auto" });
  const box = element("div", { className: "answer writing" }, element("h3", {}, element("bdi", { textContent: title })), text);
  $("answers").append(box);
  const content = [clip.part, { type: "text", text: question }];
  const subtitle = $("subtitle").value;
  if (about.reads_subtitles && subtitle !== clip.subtitle) content.push({ type: "subtitle", text: subtitle });
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: about.model, stream: true, messages: [{ role: "user", content }] }),
      signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      text.append(event.choices[0]?.delta.content ?? "");
      if (event.affectgpt) return finish(box, event.affectgpt);
    }
    throw new Error("The server ended before the answer.");
  } finally {
    box.classList.remove("writing");
  }
}

function finish(box, found) {
  if (found.labels) box.append(labelList(found.labels));
  if (found.cut) box.append(element("p", { className: "note", textContent: `cut at ${found.tokens} tokens, the limit` }));
  return found;
}

function labelList(labels) {
  const right = new Set([clip.truth?.emotion, ...(clip.truth?.labels ?? [])].map((word) => word?.trim().toLowerCase()));
  const items = labels.map((label) => {
    const item = element("li", {}, element("bdi", { textContent: label }));
    if (right.has(label)) {
      item.className = "right";
      item.append(" ✓");
      item.title = "as the truth says";
    }
    return item;
  });
  return items.length ? element("ul", { className: "labels" }, ...items) : element("p", { className: "note", textContent: "no labels" });
}

async function submit(event) {
  event.preventDefault();
  const kind = $("kind").value;
  const own = $("question").value.trim();
  if (kind === OWN && !own) {
    $("question").focus();
    return;
  }
  const questions = kind === OWN ? [own] : kind === DEFAULT ? about.asked : [kind];
  clearResult();
  asking = new AbortController();
  const { signal } = asking;
  show("result");
  $("go").disabled = true;
  const results = await Promise.allSettled(questions.map((question) => ask(question, signal)));
  if (signal.aborted) return;
  $("go").disabled = !clip.part;
  const failed = results.find((result) => result.status === "rejected");
  if (failed) problem(failed.reason);
  showTruth();
  const said = results.flatMap((result) => result.value?.places ?? []);
  drawWheel(said, clip.truth?.places ?? []);
}

function showTruth() {
  const { emotion = "", labels = [], description = "", valence = null } = clip.truth ?? {};
  const words = labels.length ? labels : emotion ? [emotion] : [];
  const lines = [words.join(", "), description, valence === null ? "" : `valence ${Number(valence.toFixed(3))}`].filter(Boolean);
  show("truth", lines.length > 0);
  $("truth").replaceChildren(element("h3", { textContent: "truth" }), ...lines.map((line) => element("p", { dir: "auto", textContent: line })));
}

// --- the wheel -----------------------------------------------------------------------------------

function drawWheel(said, truth) {
  show("wheel", said.length + truth.length > 0);
  if ($("wheel").hidden) return;
  const known = (number) => said.some((place) => place.wheels[number][0]) || truth.some((place) => place.wheels[number][0]);
  if (!known(chosen)) chosen = Math.max(0, about.wheels.findIndex((_, number) => known(number)));
  $("wheels").replaceChildren(
    "Wheel",
    ...about.wheels.map((_, number) => {
      const input = element("input", { type: "radio", name: "wheel", value: number, checked: number === chosen });
      input.onchange = () => {
        chosen = number;
        draw(said, truth);
      };
      return element("label", {}, input, element("span", { textContent: number + 1 }));
    }),
  );
  draw(said, truth);
}

function draw(said, truth) {
  const tree = about.wheels[chosen];
  const on = (places, level) => new Set(places.map((place) => place.wheels[chosen][level]).filter(Boolean));
  const marks = [0, 1].map((level) => ({ said: on(said, level), true: on(truth, level) }));
  const inner = 64, middle = 158, outer = 188;
  const size = matchMedia("(max-width: 30rem)").matches ? 470 : 530; // words around it, of which few are shown on a phone
  const drawing = svg("svg", { viewBox: `${-size / 2} ${-size / 2} ${size} ${size}`, role: "img" });
  const later = []; // what is marked is drawn above its neighbours
  const classes = (level, name) => Object.keys(marks[level]).filter((kind) => marks[level][kind].has(name)).join(" ");
  const total = tree.reduce((sum, { parts }) => sum + Math.max(parts.length, 1), 0);
  let angle = 0;
  tree.forEach(({ name, parts }, i) => {
    const end = angle + (2 * Math.PI * Math.max(parts.length, 1)) / total;
    const hue = Math.round((360 * i) / tree.length);
    sector(drawing, later, angle, end, inner, middle, hue, classes(0, name), name);
    label(later, (angle + end) / 2, (inner + middle) / 2, name, classes(0, name), (end - angle) * 100);
    parts.forEach((part, j) => {
      const from = angle + ((end - angle) * j) / parts.length;
      const to = angle + ((end - angle) * (j + 1)) / parts.length;
      sector(drawing, later, from, to, middle, outer, hue, classes(1, part), part);
      if (to - from > 0.05 || classes(1, part)) outerLabel(later, (from + to) / 2, outer + 5, part, classes(1, part));
    });
    angle = end;
  });
  later.sort((a, b) => a.order - b.order).forEach(({ node }) => drawing.append(node));
  const say = (places) =>
    places.map(({ label, wheels }) => (wheels[chosen][0] ? `${label} → ${wheels[chosen].filter(Boolean).join(", ")}` : `${label} is not on this wheel`)).join("; ");
  const parts = [];
  if (said.length) parts.push(element("span", {}, element("span", { className: "swatch" }), ` said: ${say(said)}. `));
  if (truth.length) parts.push(element("span", {}, element("span", { className: "swatch true" }), ` truth: ${say(truth)}. `));
  $("legend").replaceChildren(...parts, element("span", { textContent: `Words: ${about.lexicon}.` }));
  drawing.setAttribute("aria-label", `emotion wheel ${chosen + 1}; ${$("legend").textContent}`);
  $("drawing").replaceChildren(drawing);
}

const point = (angle, radius) => `${(radius * Math.sin(angle)).toFixed(2)} ${(-radius * Math.cos(angle)).toFixed(2)}`;

function sector(drawing, later, from, to, inner, outer, hue, kind, name) {
  // A whole ring has no beginning and no end, and an arc between equal points is none.
  if (to - from > 2 * Math.PI - 1e-6) to = from + 2 * Math.PI - 1e-3;
  const large = to - from > Math.PI ? 1 : 0;
  const path = svg("path", {
    class: `sector ${kind}`,
    d: `M${point(from, inner)}A${inner} ${inner} 0 ${large} 1 ${point(to, inner)}L${point(to, outer)}A${outer} ${outer} 0 ${large} 0 ${point(from, outer)}Z`,
  }, svg("title", {}, name));
  path.style.setProperty("--hue", hue);
  if (kind) later.push({ order: kind.includes("true") ? 2 : 1, node: path });
  else drawing.append(path);
}

// Text in lines of at most so many characters, around where it would stand in one.
function wrapped(text, most) {
  const lines = [];
  for (const word of text.split(" ")) {
    if (lines.length && lines.at(-1).length + word.length < most) lines.push(`${lines.pop()} ${word}`);
    else lines.push(word);
  }
  return lines.map((line, i) => svg("tspan", { x: 0, dy: `${i ? 1.1 : -0.55 * (lines.length - 1)}em` }, line));
}

function label(later, angle, radius, name, kind, room) {
  if (room < 14 && !kind) return;
  const [x, y] = point(angle, radius).split(" ");
  const degrees = (180 * angle) / Math.PI - 90;
  const flip = angle > Math.PI ? 180 : 0;
  later.push({ order: 3, node: svg("text", { class: kind, transform: `translate(${x} ${y}) rotate(${degrees + flip})` }, ...wrapped(name, 13)) });
}

function outerLabel(later, angle, radius, name, kind) {
  const [x, y] = point(angle, radius).split(" ");
  const degrees = (180 * angle) / Math.PI - 90;
  const flipped = angle > Math.PI;
  later.push({
    order: 3,
    node: svg("text", { class: `outer ${kind.replace("said", "on")} ${flipped ? "flipped" : ""}`, transform: `translate(${x} ${y}) rotate(${degrees + (flipped ? 180 : 0)})` }, ...wrapped(name, 15)),
  });
}

// --- start ---------------------------------------------------------------------------------------

async function start() {
  about = await json("/about");
  document.title = `AffectGPT: ${about.model}`;
  $("model").textContent = `${about.model}, ${about.step}; reads ${about.reads.join(", ")}`;
  const usual = about.asked.length > 1 ? [[about.asked.join(" and "), DEFAULT]] : [];
  const kinds = about.questions.map((kind) => [kind, kind]);
  for (const [text, value] of [...usual, ...kinds, ["a question of your own", OWN]]) $("kind").append(element("option", { value, textContent: text }));
  $("kind").onchange = () => show("question-row", $("kind").value === OWN);
  show("subtitle-row", about.reads_subtitles);
  show("drop", about.can_upload);
  show("no-drop", !about.can_upload);
  $("no-drop").textContent = about.why_not && `${about.why_not[0].toUpperCase()}${about.why_not.slice(1)}.`;
  show("pick", about.records > 0);
  $("ask").onsubmit = submit;
  $("pick").onsubmit = (event) => event.preventDefault();
  $("search").oninput = () => search().catch(problem);
  $("any").onclick = async () => {
    const names = [...$("names").querySelectorAll("bdi")].map((name) => name.textContent);
    if (names.length) await pick(names[Math.floor(Math.random() * names.length)]);
  };
  $("file").onchange = () => $("file").files.length && upload($("file").files[0]);
  if (about.can_upload) {
    // Anywhere on the page: a file that misses its place would replace the page.
    addEventListener("dragover", (event) => {
      event.preventDefault();
      $("drop").classList.add("over");
    });
    addEventListener("dragleave", () => $("drop").classList.remove("over"));
    addEventListener("drop", (event) => {
      event.preventDefault();
      $("drop").classList.remove("over");
      if (event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
    });
  }
  const names = about.records ? await search() : [];
  // A link may name a record, and ask: /#record=NAME&ask
  const wanted = new URLSearchParams(location.hash.slice(1));
  const first = wanted.get("record") ?? names[0];
  if (first !== undefined && !choices) await pick(first);
  if (wanted.has("ask") && clip) $("ask").requestSubmit();
}

start().catch(problem);
