// The form: which models there are, what they know, what is asked of them. pictures.js draws, mask.js marks photos.

import { Mask } from "/page/mask.js";
import { Batch, Refused, ask } from "/page/pictures.js";

const $ = (id) => document.getElementById(id);
const KEY = "fastigpt-key";
const SHOWN_EXAMPLES = 3;
// By what a model reads, the help below its prompt.
const PROMPTS = {
  words: "Empty draws anything the model likes.",
  text: "In words of your own. Empty draws anything the model likes.",
  class: "A class, by its name or its number. Empty draws of any class.",
  none: "",
};
const FIELDS = {
  prompt: "prompt",
  negative_prompt: "negative",
  n: "n",
  seed: "seed",
  temperature: "temperature",
  guidance_scale: "guidance",
  model: "model",
  image: "file",
  mask: "mask-canvas",
};

let models = [];
let photo = null; // the File

const status = (text) => ($("status").textContent = text);
const key = () => sessionStorage.getItem(KEY) ?? "";
const reads = (model) => model.prompts !== "none";
const usual = (model) => model.guidance_scale ?? 1; // guidance where nothing is said
const START = { temperature: $("temperature").value, guidance: $("guidance").value }; // for models that name none
const chosen = () => models.find((model) => model.id === $("model").value);
const withPhoto = () => document.querySelector("[name=begin]:checked").value === "photo";
const mask = new Mask($("mask-canvas"), $("mask-state"), () => {});

function fail(message, field) {
  $("failure").textContent = message;
  $("failure").hidden = !message;
  for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  if (!message) return;
  if (field) {
    for (let box = field.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}

// --- models and their words ---

async function load() {
  try {
    const answer = await ask("/v1/models", key());
    models = (await answer.json()).data;
  } catch (error) {
    if (error.status === 401) {
      $("key-field").hidden = false;
      $("key").focus();
      if (key()) fail("This server does not know that key.", $("key"));
      return;
    }
    fail(error.message);
    return;
  }
  $("key-field").hidden = true;
  fail("");
  $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  $("model-field").hidden = models.length < 2;
  choose();
}

function choose() {
  const model = chosen();
  const [width, height] = model.size.split("x").map(Number);
  $("about").textContent = `${model.id} draws ${width} × ${height} pixels, row by row`;
  for (const name of ["prompt-field", "guidance-field", "negative-field"]) $(name).hidden = !reads(model);
  $("all-words").hidden = !model.words.length;
  const start = { temperature: model.temperature ?? START.temperature, guidance: model.guidance_scale ?? START.guidance };
  for (const [name, value] of Object.entries(start)) {
    $(name).value = value;
    $(`${name}-value`).textContent = $(name).value;
  }
  $("examples").replaceChildren(...model.examples.map((text) => new Option(text)));
  const chip = (text, use) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => {
      use(text);
      checkWords();
    });
    return button;
  };
  const replace = (text) => ($("prompt").value = text);
  const add = (text) => ($("prompt").value = `${$("prompt").value.trim()} ${text}`.trim());
  $("suggestions").replaceChildren(...model.examples.slice(0, SHOWN_EXAMPLES).map((text) => chip(text, replace)));
  $("words").replaceChildren(...[...model.words].sort().map((text) => chip(text, add)));
  if (mask.rows !== height || mask.columns !== width) mask.resize(height, width);
  checkWords();
}

// The words of a text that the model does not know.
function unknown(text) {
  const known = new Set(chosen().words);
  if (!known.size) return [];
  const words = text.toLowerCase().match(/[\p{L}\p{N}]+(?:'[\p{L}\p{N}]+)?/gu) ?? [];
  return [...new Set(words.filter((word) => !known.has(word)))];
}

function checkWords() {
  const fields = { prompt: PROMPTS[chosen().prompts], negative: "What to lead away from; needs guidance above 1." };
  for (const [name, help] of Object.entries(fields)) {
    const odd = unknown($(name).value);
    const told = $(`${name}-help`);
    const text = odd.length ? `The model does not know ${odd.map((word) => `“${word}”`).join(", ")}.` : help;
    if (told.textContent !== text) told.textContent = text;
    told.classList.toggle("wrong", odd.length > 0);
  }
  tellDraw();
}

// --- asking ---

function tellDraw() {
  const n = Number($("n").value);
  $("draw").textContent = n > 1 ? `Draw ${n} pictures` : "Draw a picture";
}

// Everything the form says, as the server takes it; null if something is missing, which is then told.
async function asked() {
  const form = new FormData();
  const model = chosen();
  if (!model) return fail("There is no model to draw with yet."), null;
  form.set("model", model.id);
  const n = Number($("n").value);
  if (!Number.isInteger(n) || n < 1 || n > 10) return fail("Ask for 1 to 10 pictures.", $("n")), null;
  form.set("n", n);
  const seed = $("seed").value.trim();
  if (seed && !/^\d{1,20}$/.test(seed)) return fail("A seed is a whole number, or nothing for a new one.", $("seed")), null;
  if (seed) form.set("seed", seed);
  form.set("temperature", $("temperature").value);
  const prompt = reads(model) ? $("prompt").value.trim() : "";
  const negative = reads(model) ? $("negative").value.trim() : "";
  const guidance = Number($("guidance").value);
  form.set("prompt", prompt);
  if (negative && !prompt) return fail("A negative prompt needs a prompt to lead towards.", $("prompt")), null;
  if (negative && guidance <= 1) return fail("A negative prompt needs guidance above 1.", $("guidance")), null;
  if (negative) form.set("negative_prompt", negative);
  if (prompt && guidance !== usual(model)) form.set("guidance_scale", guidance);
  if (withPhoto()) {
    if (!photo) return fail("Choose a photo first.", $("file")), null;
    if (!mask.marked) return fail("Paint over what should be drawn anew, or keep the top half.", $("mask-canvas")), null;
    form.set("image", photo);
    form.set("mask", await mask.png(), "mask.png");
  }
  fail("");
  return form;
}

function titled(form) {
  const prompt = form.get("prompt");
  if (form.has("image")) return prompt ? `${photo.name}, ${prompt}` : photo.name;
  return prompt || "Anything";
}

async function draw(form, title) {
  $("empty").hidden = true;
  const again = (index, seed) => {
    const once = new FormData();
    for (const [name, value] of form) once.set(name, value);
    once.set("n", 1);
    once.set("seed", seed);
    once.set("first_index", index);
    draw(once, `${title}, no. ${index} again`);
  };
  const batch = new Batch($("results"), title, again, status);
  try {
    await batch.draw(form, key());
  } catch (error) {
    if (error.status === 401) $("key-field").hidden = false;
    const field = $(FIELDS[error.parameter]);
    fail(error instanceof Refused ? error.message : `Something went wrong here: ${error.message}`, field);
    $("empty").hidden = document.querySelector(".batch") !== null;
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = await asked();
  if (form) draw(form, titled(form));
});

// --- photos ---

async function take(file) {
  if (!file) return;
  try {
    mask.show(await createImageBitmap(file));
  } catch {
    return fail(`${file.name} is no picture that can be read: PNG, JPEG and WebP are.`, $("file"));
  }
  fail("");
  photo = file;
  $("file-name").textContent = file.name;
  $("mask").hidden = false;
}

$("file").addEventListener("change", () => take($("file").files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
const rectangle = (value) => {
  const at = ["top", "left", "height", "width"].map((name) => Math.trunc(Number($(name).value)));
  mask.rectangle(...at, value);
};
$("mark").addEventListener("click", () => rectangle(1));
$("unmark").addEventListener("click", () => rectangle(0));
$("clear-mask").addEventListener("click", () => mask.clear());
$("keep-top").addEventListener("click", () => {
  mask.clear();
  mask.rectangle(mask.rows >> 1, 0, mask.rows, mask.columns, 1);
});
$("redraw-middle").addEventListener("click", () => {
  mask.clear();
  mask.rectangle(mask.rows >> 2, mask.columns >> 2, mask.rows >> 1, mask.columns >> 1, 1);
});
$("brush").addEventListener("input", () => (mask.brush = Number($("brush").value)));
for (const tool of document.querySelectorAll("[name=tool]")) {
  tool.addEventListener("change", () => (mask.erasing = tool.value === "erase" && tool.checked));
}

// --- the rest of the form ---

for (const begin of document.querySelectorAll("[name=begin]")) {
  begin.addEventListener("change", () => ($("photo").hidden = !withPhoto()));
}
for (const name of ["temperature", "guidance", "brush"]) {
  $(name).addEventListener("input", () => ($(`${name}-value`).textContent = $(name).value));
}
for (const name of ["prompt", "negative"]) $(name).addEventListener("input", checkWords);
$("n").addEventListener("input", tellDraw);
$("model").addEventListener("change", choose);
$("use-key").addEventListener("click", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  load();
});

// A canvas that is waiting: the icon, and the rows that are still to come.
const welcome = new Image();
welcome.onload = () => {
  const context = $("welcome").getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(welcome, 0, 0, 32, 32);
  context.clearRect(0, 18, 32, 14);
  const style = getComputedStyle($("welcome"));
  for (let y = 18; y < 32; y++) {
    for (let x = 0; x < 32; x++) {
      if (y === 18 && x < 13) continue;
      context.fillStyle = style.getPropertyValue((x >> 2) + (y >> 2) & 1 ? "--line" : "--sunken");
      context.fillRect(x, y, 1, 1);
    }
  }
};
welcome.src = "/page/icon.svg";

load();
