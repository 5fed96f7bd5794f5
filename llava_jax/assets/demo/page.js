// The page: what the user sees and does. Text of the model is only ever set as text.

import { asJson, asMarkdown, call, setKey, takeKey, Talk } from "./talk.js";
import { filesOf, picture, shoot } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = [
  ["shapes-1.png", "What shape is at the top right?"],
  ["shapes-2.png", "What color is the triangle?"],
  ["shapes-3.png", "Where is the white circle?"],
];
let talk = new Talk(), pictures = [], edited = null, model = "", most = 16;

function make(tag, words = "", kind = "") {
  const element = document.createElement(tag);
  element.textContent = words;
  if (kind) element.className = kind;
  return element;
}

function button(words, label, act) {
  const made = make("button", words);
  made.type = "button";
  made.title = label;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

function image(shown, number) {
  const made = make("img");
  made.src = shown.url;
  made.alt = `Picture ${number}: ${shown.name}`;
  const opener = button("", `Look at picture ${number}`, () => look(shown));
  opener.className = "shot";
  opener.append(made);
  return opener;
}

function problem(words) {
  $("problem").hidden = !words;
  $("problem").textContent = words;
}

const settings = () => ({
  model, system: $("system").value, temperature: Number($("temperature").value),
  length: Math.max(1, Math.round(Number($("length").value)) || 512),
});

// The conversation ---------------------------------------------------------------------------------

function numbers(turn) {
  const said = [];
  if (turn.usage) {
    const { prompt_tokens: asked, completion_tokens: made, prompt_tokens_details: more } = turn.usage;
    const known = more?.cached_tokens ? `, ${more.cached_tokens} reused` : "";
    said.push(`${made} tokens`, `prompt ${asked}${known}`);
    const rest = turn.seconds - turn.first / 1000;
    if (made >= 8 && rest > 0) said.push(`${((made - 1) / rest).toFixed(1)} tokens/s`);
  }
  if (turn.first) said.push(`first after ${(turn.first / 1000).toFixed(2)} s`);
  if (turn.reason === "length") said.push("cut off at the longest length");
  if (turn.reason === "stopped") said.push("stopped");
  return said;
}

function drawTurn(turn, i) {
  const item = make("li", "", `turn ${turn.role}${turn.running ? " running" : ""}`);
  item.setAttribute("aria-label", turn.role === "user" ? "You" : "Model");
  if (turn.pictures?.length) {
    const list = make("ul", "", "shown");
    turn.pictures.forEach((p, n) => { const one = make("li"); one.append(image(p, n + 1)); list.append(one); });
    item.append(list);
  }
  if (turn.text || turn.running) item.append(make("div", turn.text, "words"));
  if (turn.problem) item.append(make("div", turn.problem, "words bad"));
  else if (!turn.text && !turn.running) item.append(make("div", "(no answer)", "words soft"));
  const line = make("div", "", "line");
  if (turn.role === "assistant") numbers(turn).forEach((words) => line.append(make("span", words)));
  if (!talk.running) {
    if (turn.role === "user") line.append(button("Edit", "Edit this message", () => edit(i)));
    else {
      if (turn.text) line.append(button("Copy", "Copy this answer", () => navigator.clipboard.writeText(turn.text)));
      if (i === talk.turns.length - 1) line.append(button("Regenerate", "Ask again; the answer is the same at temperature 0", regenerate));
    }
  }
  if (line.childNodes.length) item.append(line);
  return item;
}

function draw() {
  $("talk").replaceChildren(...talk.turns.map(drawTurn));
  $("welcome").hidden = talk.turns.length > 0;
  $("send").hidden = Boolean(talk.running);
  $("stop").hidden = !talk.running;
  $("export").disabled = $("new").disabled = talk.turns.length === 0 || Boolean(talk.running);
  $("editing").hidden = edited === null;
}

let waiting = null; // a drawing of the last turn, at most one for each frame

function changed(turn) {
  if (!turn.running || !turn.text) return drawAndFollow(draw);
  waiting ??= requestAnimationFrame(() => {
    waiting = null;
    const words = $("talk").lastElementChild?.querySelector(".words");
    if (turn.running && words) drawAndFollow(() => { words.textContent = turn.text; });
  });
}

// Stays at the end of the conversation, unless the reader has scrolled up.
function drawAndFollow(act) {
  const box = $("drop"), follows = box.scrollHeight - box.scrollTop - box.clientHeight < 90;
  act();
  if (follows) box.scrollTop = box.scrollHeight;
}

async function answer() {
  problem("");
  const asked = talk;
  const done = talk.answer(settings(), (turn) => { if (asked === talk) changed(turn); });
  $("drop").scrollTop = $("drop").scrollHeight;
  await done;
  if (asked.turns.at(-1).status === 401) askKey();
  $("text").focus({ preventScroll: true });
}

function send() {
  const text = $("text").value.trim();
  if (talk.running || (!text && !pictures.length)) return;
  if (!text) return problem("Write what you want to know about the picture.");
  if (edited !== null) talk.turns.length = edited;
  edited = null;
  talk.turns.push({ role: "user", text, pictures });
  compose("", []);
  answer();
}

function regenerate() {
  talk.turns.pop();
  answer();
}

function edit(i) {
  edited = i;
  compose(talk.turns[i].text, [...talk.turns[i].pictures]);
  draw();
  $("text").focus();
}

function compose(text, shown) {
  $("text").value = text;
  pictures = shown;
  drawPictures();
  fit();
}

function fit() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight * 0.34)}px`;
}

// Pictures -----------------------------------------------------------------------------------------

function drawPictures() {
  $("pictures").replaceChildren(...pictures.map((shown, i) => {
    const item = make("li"), off = button("×", `Remove picture ${i + 1}`, () => { pictures.splice(i, 1); drawPictures(); });
    off.className = "off";
    item.append(image(shown, i + 1), off);
    return item;
  }));
}

async function add(files) {
  problem("");
  for (const file of files) {
    try {
      pictures.push(await picture(file));
    } catch (error) {
      problem(error.message);
    }
  }
  const all = pictures.length + talk.turns.reduce((sum, t) => sum + (t.pictures?.length ?? 0), 0);
  if (all > most) problem(`A conversation may show ${most} pictures; this one would have ${all}.`);
  drawPictures();
  $("text").focus({ preventScroll: true });
}

async function look(shown) {
  $("whole").src = shown.url;
  $("seen").removeAttribute("src");
  $("seen-note").textContent = "As the model sees it";
  $("viewer").showModal();
  try {
    const reply = await call("/demo/seen", { url: shown.url });
    const { url, side } = await reply.json();
    $("seen").src = url;
    $("seen-note").textContent = `As the model sees it: ${side} × ${side}`;
  } catch (error) {
    $("seen-note").textContent = error.message;
  }
}

async function examples() {
  for (const [name, question] of EXAMPLES) {
    const one = button("", question, async () => {
      const blob = await (await fetch(`/demo/${name}`)).blob();
      compose(question, [await picture(new File([blob], name, { type: blob.type }))]);
      send();
    });
    const shown = make("img");
    shown.src = `/demo/${name}`;
    shown.alt = "";
    one.append(shown, make("span", question));
    $("examples").append(one);
  }
}

// The frame around it ------------------------------------------------------------------------------

function save(kind) {
  const [text, type] = kind === "json" ? [asJson(talk, settings()), "application/json"] : [asMarkdown(talk, settings()), "text/markdown"];
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = `conversation-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function askKey() {
  if (!$("asking-key").open) $("asking-key").showModal();
}

function state(words, bad = false) {
  $("state").textContent = words;
  $("state").classList.toggle("bad", bad);
}

async function connect() {
  try {
    const health = await (await fetch("/health")).json();
    if (health.status !== "ready") {
      state(health.status, health.status !== "warming up");
      return setTimeout(connect, 1000);
    }
    const [found] = (await (await call("/v1/models")).json()).data;
    model = found.id;
    most = found.max_images ?? most;
    $("model").textContent = document.title = model;
    $("length").max = found.max_model_len;
    $("context").textContent = `Prompt and answer share ${found.max_model_len.toLocaleString("en")} positions; each picture takes ${found.image_span} of them.`;
    state("ready");
  } catch (error) {
    state(error.status === 401 ? "key needed" : "no connection", true);
    if (error.status === 401) askKey();
    else setTimeout(connect, 2000);
  }
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function listen() {
  const on = (id, event, act) => $(id).addEventListener(event, act);
  on("composer", "submit", (event) => { event.preventDefault(); send(); });
  on("stop", "click", () => talk.stop());
  on("text", "input", fit);
  on("text", "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  on("attach", "click", () => $("file").click());
  on("file", "change", () => { add([...$("file").files]); $("file").value = ""; });
  on("camera", "click", async () => {
    const taken = await shoot($("shooting"), $("video"), $("camera-problem"));
    if (taken) { pictures.push(taken); drawPictures(); }
  });
  on("leave-editing", "click", () => { edited = null; compose("", []); draw(); });
  on("new", "click", () => { talk = new Talk(); edited = null; compose("", []); problem(""); draw(); });
  on("export", "click", () => { $("saving").returnValue = ""; $("saving").showModal(); });
  on("saving", "close", () => { if ($("saving").returnValue) save($("saving").returnValue); });
  on("asking-key", "close", () => { if ($("key").value) setKey($("key").value); $("key").value = ""; connect(); });
  on("temperature", "input", () => { $("temperature-value").textContent = $("temperature").value; });
  on("theme", "click", () => theme(document.documentElement.dataset.theme !== "dark"));
  on("settings-button", "click", () => {
    const open = $("settings").classList.toggle("open");
    $("settings-button").setAttribute("aria-expanded", open);
    $("settings-button").textContent = open ? "Close" : "Settings";
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && talk.running) talk.stop(); });
  document.addEventListener("paste", (event) => {
    const files = filesOf(event.clipboardData);
    if (files.length) { event.preventDefault(); add(files); }
  });
  const dragging = (on) => document.body.classList.toggle("dragging", on);
  document.addEventListener("dragover", (event) => { event.preventDefault(); dragging(true); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) dragging(false); });
  document.addEventListener("drop", (event) => { event.preventDefault(); dragging(false); add(filesOf(event.dataTransfer)); });
  addEventListener("beforeunload", (event) => { if (talk.turns.length) event.preventDefault(); });
}

theme(matchMedia("(prefers-color-scheme: dark)").matches);
listen();
draw();
examples();
if (takeKey()) connect();
else { state("key needed", true); askKey(); }
