"use strict";

// A mark is sent a little later, so that it can be taken back: what the monitor has recorded stays.
const UNDO_MILLISECONDS = 4000;
const REFRESH_MILLISECONDS = 5000;
const MOST_SHOWN = 200;
const WHY = {
  entropy: "sure under overlays",
  plain_entropy: "very sure of the input",
  nll: "the repaired network disagrees",
  not_finite: "a network's answer is not a number",
};

const $ = (id) => document.getElementById(id);
const cards = new Map(); // by key: {input, element, mark, timer}
let token = sessionStorage.getItem("stripwire-token") ?? "";
let chosen = null;
let marked = []; // keys whose marks may be taken back, the last one at the end

function ask(path, options = {}) {
  return fetch(path, { ...options, headers: { ...options.headers, Authorization: `Bearer ${token}` } });
}

function complain(place, text) {
  $(place).textContent = text;
  $(place).hidden = text === "";
}

async function refresh() {
  let answer;
  try {
    answer = await ask(`v1/quarantine?limit=${MOST_SHOWN}&labelled=${$("labelled").checked}`);
  } catch {
    complain("away", "The monitor cannot be reached; marks that were not sent are kept here.");
    return;
  }
  const found = await answer.json();
  const locked = answer.status === 401;
  $("ask").hidden = !locked;
  if (locked) {
    complain("away", token === "" ? "" : "That is not the feedback token.");
    $("token").focus();
    return;
  }
  complain("away", answer.ok ? "" : found.error);
  if (answer.ok) {
    show(found);
  }
}

function show(found) {
  const { kept, unlabelled } = found;
  $("summary").textContent = `${kept} kept, ${unlabelled} of them not labelled`;
  const wanted = new Set(found.inputs.map((input) => input.key));
  for (const [key, card] of cards) {
    if (!wanted.has(key) && card.mark === undefined && key !== chosen) {
      drop(card);
    }
  }
  // New ones come in at the end, so that nothing moves under a finger.
  for (const input of found.inputs) {
    const known = cards.get(input.key);
    if (known === undefined) {
      add(input);
    } else {
      known.input = input;
      draw(known);
      if (!known.element.querySelector("img").src) {
        picture(known);
      }
    }
  }
  if (chosen === null || !cards.has(chosen)) {
    choose(cards.keys().next().value ?? null);
  }
}

function add(input) {
  const element = $("card").content.cloneNode(true).firstElementChild;
  const card = { input, element };
  const bits = input.entropy_bits === null ? "no entropy" : `${input.entropy_bits.toPrecision(3)} bits`;
  element.querySelector(".verdict").textContent = `class ${input.label}, ${bits}, p = ${input.p_value.toPrecision(2)}`;
  element.querySelector(".why").textContent = input.scores.map((score) => WHY[score] ?? score).join("; ");
  element.querySelector(".when").textContent =
    `${new Date(1000 * input.rejected_at).toLocaleString(undefined, { timeZoneName: "short" })}, version ${input.version}`;
  element.querySelector(".id").textContent = input.request_id;
  element.querySelector("img").alt = `rejected input ${input.request_id}`;
  element.addEventListener("focusin", () => choose(input.key, false));
  element.addEventListener("click", () => choose(input.key));
  element.querySelector(".remove").addEventListener("click", () => remove(card));
  for (const button of element.querySelectorAll("[data-truth]")) {
    button.addEventListener("click", () => mark(input.key, button.dataset.truth));
  }
  cards.set(input.key, card);
  $("inputs").append(element);
  draw(card);
  picture(card);
}

function drop(card) {
  URL.revokeObjectURL(card.element.querySelector("img").src);
  card.element.remove();
  cards.delete(card.input.key);
}

// The input itself, for good; a mark that waits is sent before.
async function remove(card) {
  const { key, request_id } = card.input;
  if (!confirm(`Remove ${request_id} for good? What was said of it stays in the record.`)) {
    return;
  }
  if (card.timer !== undefined) {
    clearTimeout(card.timer);
    await send(card);
  }
  let answer;
  try {
    answer = await ask(`v1/quarantine/${encodeURIComponent(key)}`, { method: "DELETE" });
  } catch {
    complain("unrecorded", `${request_id} was not removed: the monitor cannot be reached.`);
    return;
  }
  if (!answer.ok && answer.status !== 404) {
    complain("unrecorded", `${request_id} was not removed: ${(await answer.json()).error}`);
    return;
  }
  complain("unrecorded", "");
  step(1);
  drop(card);
  refresh();
}

async function picture(card) {
  try {
    const answer = await ask(`v1/quarantine/${encodeURIComponent(card.input.key)}.png`);
    if (answer.ok) {
      card.element.querySelector("img").src = URL.createObjectURL(await answer.blob());
    }
  } catch {
    // The next refresh tries again.
  }
}

function draw(card) {
  const truth = card.mark ?? card.input.truth;
  const label = card.element.querySelector(".truth");
  label.textContent = truth ?? "";
  label.className = `truth ${truth ?? ""}`;
  card.element.classList.toggle("labelled", truth !== null);
  for (const button of card.element.querySelectorAll("[data-truth]")) {
    button.hidden = truth !== null;
  }
}

function choose(key, focus = true) {
  for (const [each, card] of cards) {
    card.element.classList.toggle("chosen", each === key);
    card.element.tabIndex = each === key ? 0 : -1;
  }
  chosen = key;
  if (focus && cards.has(key)) {
    cards.get(key).element.focus({ preventScroll: true });
    cards.get(key).element.scrollIntoView({ block: "nearest" });
  }
}

function step(by) {
  const keys = [...cards.keys()];
  const at = keys.indexOf(chosen) + by;
  if (at >= 0 && at < keys.length) {
    choose(keys[at]);
  }
}

function mark(key, truth) {
  const card = cards.get(key);
  if (card === undefined || card.mark !== undefined || card.input.truth !== null) {
    return;
  }
  card.mark = truth;
  later(card);
  marked.push(key);
  complain("unrecorded", "");
  draw(card);
  chooseUnmarked(key);
}

// The next one that waits for a mark, or else the one before.
function chooseUnmarked(from) {
  const keys = [...cards.keys()];
  const at = keys.indexOf(from);
  const waits = (key) => (cards.get(key).mark ?? cards.get(key).input.truth) === null;
  const found = keys.slice(at + 1).find(waits) ?? keys.slice(0, at).reverse().find(waits);
  if (found !== undefined) {
    choose(found);
  }
}

function later(card) {
  card.timer = setTimeout(() => send(card), UNDO_MILLISECONDS);
}

function takeBack() {
  marked = marked.filter((key) => cards.get(key)?.timer !== undefined);
  const key = marked.pop();
  if (key === undefined) {
    complain("unrecorded", "There is nothing to take back: what was recorded stays.");
    return;
  }
  const card = cards.get(key);
  clearTimeout(card.timer);
  card.timer = card.mark = undefined;
  draw(card);
  choose(key);
}

async function send(card, keepalive = false) {
  card.timer = undefined;
  const feedback = { request_id: card.input.key, truth: card.mark, verdict: "rejected" };
  try {
    const answer = await ask("v1/feedback", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(feedback),
      keepalive,
    });
    const again = answer.status === 401 || answer.status === 503;
    if (answer.ok) {
      card.input.truth = card.mark;
    } else {
      const what = again ? "is not recorded yet" : "was not recorded";
      complain("unrecorded", `${card.input.request_id} ${what}: ${(await answer.json()).error}`);
    }
    if (again) {
      later(card);
    } else {
      card.mark = undefined;
    }
  } catch {
    complain("away", "The monitor cannot be reached; marks that were not sent are kept here.");
    later(card);
  }
  draw(card);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=password]")) {
    return;
  }
  // A key that is held down must not mark one after another.
  if (event.repeat && !event.key.startsWith("Arrow")) {
    return;
  }
  const act = {
    c: () => mark(chosen, "clean"),
    t: () => mark(chosen, "trojaned"),
    z: takeBack,
    ArrowRight: () => step(1),
    ArrowLeft: () => step(-1),
  }[event.key];
  if (act !== undefined) {
    event.preventDefault();
    act();
  }
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  sessionStorage.setItem("stripwire-token", token);
  refresh();
});

$("labelled").addEventListener("change", refresh);

window.addEventListener("pagehide", () => {
  for (const card of cards.values()) {
    if (card.timer !== undefined) {
      clearTimeout(card.timer);
      send(card, true);
    }
  }
});

setInterval(() => document.hidden || $("ask").hidden === false || refresh(), REFRESH_MILLISECONDS);
refresh();
