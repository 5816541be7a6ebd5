"use strict";
// The page of one model: it sends what the form says, draws each step that comes back, and keeps all for the slider.

const $ = (id) => document.getElementById(id);
const frames = []; // as the text was: for each token its piece (null is a mask), confidence, and the frame that decided it
const steps = []; // the number of the step after which each frame was: steps that change nothing have none
let given = [], total = 0, stopper = null, player = null, here = -1;

const piece = (token) => (token === null ? "▒" : token);

/** Draw the text as it was after a step; tokens take a colour by the step that decided them. */
function draw(step) {
  const frame = frames[step] || [], last = Math.max(frames.length - 1, 1);
  const nodes = frame.map(([token, confidence, decided], i) => {
    const span = document.createElement("span");
    span.textContent = piece(token);
    if (given[i]) span.className = "given";
    else if (token === null) span.className = "masked";
    else span.style.setProperty("--when", `${Math.round((100 * decided) / last)}%`);
    if (decided === step && step > 0 && step < frames.length - 1) span.classList.add("fresh");
    span.title = told(i, frame[i]);
    span.dataset.i = i;
    return span;
  });
  $("text").replaceChildren(...nodes);
  $("step").max = frames.length - 1;
  $("step").value = step;
  $("number").textContent = `step ${steps[step] ?? 0}${total ? ` of ${total}` : ""}`;
  if (here >= 0) mark(Math.min(here, frame.length - 1));
}

function told(i, [token, confidence, decided]) {
  if (given[i]) return `${JSON.stringify(token)}: given`;
  if (token === null) return "masked";
  const sure = confidence === null ? "" : `, probability ${confidence < 0.01 ? "below 0.01" : confidence.toFixed(2)}`;
  return `${JSON.stringify(token)}: step ${steps[decided]}${sure}`;
}

function mark(i) {
  const spans = $("text").children;
  for (const span of spans) span.classList.toggle("here", Number(span.dataset.i) === i);
  here = spans.length ? i : -1;
  $("token").textContent = here < 0 ? "" : spans[here].title;
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

/** Return what the form says, without what is left as it is. */
function asked() {
  const query = new URLSearchParams();
  for (const field of $("form").elements)
    if (field.name && field.value !== "" && field.value !== field.dataset.usual) query.set(field.name, field.value);
  if (/\[MASK/.test($("prompt").value)) {
    query.delete("prompt");
    query.set("infill", $("prompt").value);
  }
  query.set("seed", $("seed").value || "0");
  return query;
}

/** Yield the events of a response, [name, data], as they come. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = Object.fromEntries(part.split("\n").map((line) => line.split(/: (.*)/s)));
      yield [lines.event, JSON.parse(lines.data)];
    }
  }
}

async function write() {
  if (stopper) return;
  pause();
  stopper = new AbortController();
  $("write").disabled = true;
  $("stop").disabled = false;
  const query = asked();
  history.replaceState(null, "", `?${query}`);
  say("Waiting for the model …");
  try {
    const response = await fetch(`api/text?${query}`, { signal: stopper.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    let last = "";
    for await (const [name, data] of events(response)) take((last = name), data);
    if (last !== "done") throw new Error("The text was cut off: write it again.");
    if ($("next").checked) $("seed").value = (Number($("seed").value) + 1) % 2147483648;
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  }
  stopper = null;
  $("write").disabled = false;
  $("stop").disabled = true;
}

function take(name, data) {
  if (name === "queued") say(data.ahead ? `${data.ahead} before this one …` : "Waiting for the model …");
  if (name === "start") {
    frames.length = steps.length = total = 0;
    mark(here = -1);
    given = data.tokens.map((token) => token !== null);
    frames.push(data.tokens.map((token) => [token, null, 0]));
    steps.push(0);
    $("player").hidden = $("after").hidden = false;
    say("Writing …");
    draw(0);
  }
  if (name === "step") {
    const frame = frames[frames.length - 1].slice(), step = frames.length;
    for (const [i, token, confidence] of data.changed) frame[i] = [token, confidence, step];
    frames.push(frame);
    steps.push(data.number);
    draw(step);
  }
  if (name === "done") {
    const calls = `${data.calls} call${data.calls === 1 ? "" : "s"} of the network`;
    say(`${calls}, ${data.seconds.toFixed(1)} s, seed ${data.seed}.`);
    $("text").dataset.whole = data.text;
    total = data.steps;
    draw(frames.length - 1);
  }
  if (name === "failed") throw new Error(data.message);
}

function pause() {
  clearInterval(player);
  player = null;
  $("play").textContent = "Play";
}

function play() {
  if (player) return pause();
  const pace = Math.max(30, Math.min(250, 5000 / frames.length));
  draw(0);
  $("play").textContent = "Pause";
  player = setInterval(() => {
    const step = Number($("step").value) + 1;
    if (step >= frames.length) pause();
    else draw(step);
  }, pace);
}

/** Put a mask of as many tokens in the place of what is selected. */
async function mask() {
  const field = $("prompt"), from = field.selectionStart, words = field.value.slice(from, field.selectionEnd).trimEnd();
  const response = await fetch(`api/tokens?${new URLSearchParams({ text: words })}`);
  const found = await response.json();
  if (!response.ok) return say(found.error.message, true);
  field.setRangeText(words ? `[MASK:${found.tokens}]` : "[MASK]", from, from + words.length, "end");
  field.focus();
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${what} is copied.`);
  } catch {
    say(text);
  }
}

/** Make a field for each option of the model's samplers. */
function offer(model) {
  $("model").textContent = `${model.name} · ${model.kind} · ${model.parameters.toLocaleString("en")} parameters`;
  document.title = `${model.name} · nanodlm`;
  for (const option of model.options) {
    const label = document.createElement("label"), field = document.createElement(option.choices ? "select" : "input");
    label.textContent = option.name.replaceAll("_", " ");
    label.title = option.about;
    field.name = option.name;
    if (option.choices) field.append(...option.choices.map((choice) => new Option(choice, choice)));
    else Object.assign(field, { type: "number", step: option.whole ? 1 : "any", inputMode: "decimal" });
    field.value = field.dataset.usual = option.value ?? "";
    if (option.value === null) field.placeholder = "as long as a row";
    label.append(field);
    $("options").append(label);
  }
}

async function begin() {
  const response = await fetch("api/model");
  offer(await response.json());
  const query = new URLSearchParams(location.search);
  for (const field of $("form").elements) if (field.name && query.has(field.name)) field.value = query.get(field.name);
  if (query.has("infill")) $("prompt").value = query.get("infill");
  if (query.size) $("next").checked = false;
  $("form").addEventListener("submit", (event) => { event.preventDefault(); write(); });
  $("stop").addEventListener("click", () => stopper?.abort());
  $("mask").addEventListener("click", mask);
  $("play").addEventListener("click", play);
  $("step").addEventListener("input", () => { pause(); draw(Number($("step").value)); });
  $("copy").addEventListener("click", () => copy($("text").dataset.whole || $("text").textContent, "The text"));
  $("link").addEventListener("click", () => copy(location.href, "The link"));
  $("text").addEventListener("pointerover", (event) => event.target.dataset.i && mark(Number(event.target.dataset.i)));
  $("text").addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (!move || !$("text").children.length) return;
    event.preventDefault();
    mark(Math.min(Math.max(here + move, 0), $("text").children.length - 1));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stopper?.abort();
    if (event.ctrlKey && event.key === "Enter") write();
    if (event.ctrlKey && event.key === "m") { event.preventDefault(); mask(); }
  });
  if (query.size) write();
}

begin().catch((error) => say(`The model cannot be reached: ${error.message}`, true));
