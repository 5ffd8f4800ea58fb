"use strict";
// Asks the endpoint of this server, and shows each look again as it happens. No outside resource is used.

const $ = (id) => document.getElementById(id);
const make = (tag, given = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), given);
  element.append(...children);
  return element;
};
const FIELDS = ["max_actions", "crop_margin", "max_tokens", "temperature", "seed"];
const ABLATIONS = { features_zeroed: "Zero features", region_random: "Random region" };
let about = { actions: ["free", "none"], model: "", examples: [] };
let turns = []; // {question, url, answers: [{settings, text, steps, ...}]}
let next = null; // the image of the question to come, as a URL
let running = null;

// Images

const loaded = (url) => new Promise((resolve, reject) => {
  const image = new Image();
  image.onload = () => resolve(image);
  image.onerror = () => reject(new Error("this is no image that a browser can show"));
  image.src = url;
});

// What the server has drawn; a slider lays f·c over the image

const picture = ({ png, caption }) => make("img", { src: png, alt: caption });

function faded(whole, seen) {
  const over = picture(seen);
  const slider = make("input", { type: "range", min: 0, max: 100, value: 100 });
  slider.addEventListener("input", () => { over.style.opacity = slider.value / 100; });
  const both = make("div", { className: "stack" }, picture(whole), over);
  return make("div", {}, both, make("label", {}, seen.caption, slider));
}

async function setImage(url) {
  try {
    const small = (await loaded(url)).naturalWidth < 240;
    next = url;
    Object.assign($("stage"), { src: url, hidden: false, className: small ? "small" : "" });
    $("hint").hidden = true;
  } catch (error) {
    $("hint").hidden = false;
    $("hint").textContent = error.message;
  }
}

function take(file) {
  if (!file) return;
  const reader = new FileReader();
  if (file.name.endsWith(".json")) {
    reader.onload = () => open(reader.result);
    reader.readAsText(file);
  } else {
    reader.onload = () => setImage(reader.result);
    reader.readAsDataURL(file);
  }
}

// Asking

function settings() {
  const given = { action: $("action").value };
  for (const name of FIELDS) if ($(name).value !== "") given[name] = Number($(name).value);
  return given;
}

function messages(upTo) {
  return turns.slice(0, upTo + 1).flatMap((turn, number) => {
    const parts = [{ type: "text", text: turn.question }];
    if (turn.url) parts.unshift({ type: "image_url", image_url: { url: turn.url } });
    const said = { role: "assistant", content: turn.answers[0]?.text ?? "" };
    return number < upTo ? [{ role: "user", content: parts }, said] : [{ role: "user", content: parts }];
  });
}

async function* pieces(body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const reply = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) if (event !== "data: [DONE]") yield JSON.parse(event.slice(6));
  }
}

async function answer(number, wanted) {
  const own = { settings: wanted, text: "", steps: [], seconds: null, ended: "", error: "" };
  turns[number].answers.push(own);
  const card = cardOf(number, own);
  running = new AbortController();
  busy(true);
  const began = performance.now();
  try {
    const body = { model: about.model, messages: messages(number), stream: true, pictures: true, ...wanted };
    for await (const piece of pieces(body, running.signal)) {
      if (piece.error) throw new Error(piece.error.message);
      const { delta, finish_reason: ended } = piece.choices[0];
      own.text += delta.content ?? "";
      if (delta.vpt?.step) own.steps.push(delta.vpt.step);
      if (ended) Object.assign(own, { text: delta.vpt.answer, confidence: delta.vpt.confidence, ended });
      card.show();
    }
  } catch (error) {
    own.error = error.name === "AbortError" ? "stopped" : error.message;
  }
  own.seconds = (performance.now() - began) / 1000;
  running = null;
  busy(false);
  card.show();
}

function busy(is) {
  $("send").disabled = is;
  $("stop").hidden = !is;
  $("save").disabled = is || !turns.length;
  for (const control of document.querySelectorAll(".more button, .more select")) control.disabled = is;
}

// Showing

function nameOf({ action, ablation }) {
  const looks = { free: "looks again as it likes", none: "does not look again" }[action] ?? `looks again by ${action}`;
  return ablation ? `${looks}; ${ABLATIONS[ablation].toLowerCase()}` : looks;
}

function stepFigure(step) {
  const [whole, seen] = step.pictures ?? [];
  const pair = seen && step.box && make("div", { className: "pair" }, picture(whole), picture(seen));
  const caption = make("figcaption", {}, step.note, make("br"), make("code", {}, step.requested));
  return make("figure", {}, pair || (seen ? faded(whole, seen) : ""), caption);
}

function cardOf(number, own) {
  const steps = make("div", { className: "answers" }), said = make("p", { className: "said" });
  const note = make("p", { className: "quiet" }), more = make("div", { className: "more" });
  const again = make("select", { title: "Ask again, and compare" }, make("option", { value: "" }, "Compare with …"));
  again.setAttribute("aria-label", "Ask again, and compare");
  for (const action of about.actions) again.append(make("option", { value: action }, nameOf({ action })));
  again.addEventListener("change", () => {
    const action = again.value;
    again.value = "";
    answer(number, { ...own.settings, ablation: undefined, action });
  });
  more.append(again);
  for (const [ablation, text] of Object.entries(ABLATIONS)) {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => answer(number, { ...own.settings, ablation }));
    more.append(button);
  }
  const card = make("article", { className: "answer" }, make("h3", {}, nameOf(own.settings)), steps, said, note);
  if (number === turns.length - 1) card.append(more);
  $(`turn-${number}`).querySelector(".answers").append(card);
  const show = () => {
    while (steps.children.length < own.steps.length) steps.append(stepFigure(own.steps[steps.children.length]));
    said.textContent = own.text;
    card.classList.toggle("ended", own.seconds !== null);
    note.className = own.error ? "bad" : "quiet";
    note.textContent = own.error || (own.seconds === null ? "" : [
      `${own.steps.length} look${own.steps.length === 1 ? "" : "s"}`, `${own.seconds.toFixed(2)} s`,
      `confidence ${(own.confidence * 100).toFixed(0)} %`, own.ended === "length" ? "cut off" : "",
    ].filter(Boolean).join(" · "));
  };
  show();
  return { show };
}

function showTurn(number) {
  $("empty").hidden = true;
  const turn = make("div", { className: "turn", id: `turn-${number}` }, make("h2", {}, turns[number].question));
  turn.append(make("div", { className: "answers" }));
  for (const old of document.querySelectorAll(".more")) old.remove();
  $("thread").append(turn);
  turn.scrollIntoView({ block: "nearest" });
}

function clear() {
  running?.abort();
  turns = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("save").disabled = true;
}

function restore(saved) {
  clear();
  for (const turn of saved) {
    turns.push(turn);
    showTurn(turns.length - 1);
    for (const own of turn.answers) cardOf(turns.length - 1, own);
  }
  busy(false);
}

async function open(text) {
  const before = turns;
  try {
    const read = JSON.parse(text).turns;
    if (!read.every((turn) => typeof turn.question === "string" && Array.isArray(turn.answers))) throw new Error();
    restore(read);
    if (turns[0]?.url) await setImage(turns[0].url);
    next = null;
  } catch {
    if (turns !== before) restore(before); // what was opened cannot be shown
    $("hint").hidden = false;
    $("hint").textContent = "this file holds no saved conversation";
  }
}

function save() {
  const data = JSON.stringify({ model: about.model, turns }, null, 1);
  const link = make("a", { href: URL.createObjectURL(new Blob([data], { type: "application/json" })) });
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

// Controls

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  turns.push({ question, url: next, answers: [] });
  next = null;
  showTurn(turns.length - 1);
  $("question").value = "";
  answer(turns.length - 1, settings());
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => { clear(); $("hint").hidden = false; $("stage").hidden = true; next = null; });
$("save").addEventListener("click", save);
$("file").addEventListener("change", () => { take($("file").files[0]); $("file").value = ""; });
$("url").addEventListener("change", () => { if ($("url").value) { next = $("url").value; $("hint").textContent = next; } });
$("drop").addEventListener("click", () => $("file").click());
$("drop").addEventListener("keydown", (event) => { if (["Enter", " "].includes(event.key)) $("file").click(); });
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => take([...event.clipboardData.files][0]));

(async () => {
  about = await (await fetch("about")).json();
  $("model").textContent = about.model;
  for (const action of about.actions) $("action").append(make("option", { value: action }, nameOf({ action })));
  for (const name of FIELDS) $(name).placeholder = about[name] ?? "";
  $("by-url").hidden = !about.urls;
  $("keyed").hidden = !about.keyed;
  about.examples.forEach(({ url, question }, number) => {
    const image = make("img", { src: url, alt: `Example ${number + 1}` });
    const button = make("button", { type: "button", title: question }, image);
    button.addEventListener("click", async () => {
      const data = await (await fetch(url)).blob();
      $("new").click();
      take(new File([data], "example.png", { type: "image/png" }));
      $("question").value = question;
      $("question").focus();
    });
    $("examples").append(button);
  });
})();
