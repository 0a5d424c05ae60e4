// The page: generate images, and talk about them, through the server's own API.
// No library and no build step. Text of the model or of a file only ever becomes textContent.

const $ = (id) => document.getElementById(id);

const EXAMPLES = ["a red apple", "a blue whale", "a green car"];
const COMPARED = {guidance: "1, 2, 4, 8", steps: "5, 10, 20, 50"};
const MIMES_SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];
const LAST_SEED = 2 ** 32 - 1;
const LONGEST_SIDE = 2048; // pixels; larger images are made smaller before they are sent
const MOST_BYTES = 4 * 2 ** 20;

/** Creates an element. `properties` are set on it, `children` are nodes or texts. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- The API

/** An error that the server explained, with its HTTP status. */
class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Requests `path`; returns the response, or throws the server's own sentence. */
async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem("key");
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `The server answered ${response.status}.`;
  if (response.status === 401) askForKey();
  throw new ServerError(message, response.status);
}

/**
 * The events of a stream (server-sent events of a POST).
 * `onWait` gets the request's position in the queue, which the server tells in comments.
 */
async function* stream(path, body, signal, onWait) {
  const isForm = body instanceof FormData;
  const response = await request(path, {
    method: "POST",
    signal,
    headers: isForm ? {} : {"Content-Type": "application/json"},
    body: isForm ? body : JSON.stringify(body),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new ServerError("The connection ended before the answer was complete.");
    buffer += value.replaceAll("\r", "");
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const waiting = block.match(/^: wait position=(\d+)/m);
      if (waiting) onWait?.(Number(waiting[1]));
      const data = block
        .split("\n")
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart())
        .join("\n");
      if (!data) continue;
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message);
      yield event;
    }
  }
}

const isStopped = (error) => error.name === "AbortError";
const seconds = (began) => `${((performance.now() - began) / 1000).toFixed(1)} s`;

/** Shows a sentence in a status line, as an error if `isError`. */
function tell(id, text, isError = false) {
  $(id).textContent = text;
  $(id).classList.toggle("error", isError);
}

// ---- The model

let model = {};
let modelId = "";

async function connect() {
  try {
    const models = await (await request("v1/models")).json();
    modelId = models.data[0].id;
    model = models.data[0].janusflow ?? {};
  } catch (error) {
    $("about").textContent = error.message;
    return;
  }
  const size = model.image_size ? `${model.image_size} × ${model.image_size} pixels` : "";
  $("about").textContent = [modelId, size, model.dtype, model.device].filter(Boolean).join(" · ");
  document.title = `JanusFlow: ${modelId}`;

  const {limits = {}, defaults = {}} = model;
  setValue("steps", defaults.num_inference_steps);
  setValue("guidance", defaults.guidance_scale);
  setValue("max-tokens", defaults.max_tokens);
  setLimit("count", limits.n);
  setLimit("steps", limits.num_inference_steps);
  setLimit("guidance", limits.guidance_scale);
  setLimit("previews", limits.partial_images);
  setLimit("max-tokens", limits.max_tokens);
  if (limits.prompt_chars) $("prompt").maxLength = limits.prompt_chars;

  $("tab-generate").hidden = model.generates === false;
  $("attach").hidden = model.understands === false;
  if (model.generates === false) show("chat");
}

function setLimit(id, value) {
  if (!value) return;
  $(id).max = value;
  if (Number($(id).value) > value) setValue(id, value);
}

function setValue(id, value) {
  if (value === undefined || value === null) return;
  $(id).value = value;
  $(id).dispatchEvent(new Event("input"));
}

// ---- The API key

function askForKey() {
  $("key-open").hidden = false;
  $("key").value = sessionStorage.getItem("key") ?? "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-open").onclick = askForKey;
$("key-cancel").onclick = () => $("key-dialog").close();
$("key-form").onsubmit = () => {
  sessionStorage.setItem("key", $("key").value.trim());
  connect();
};

// ---- Tabs

const TABS = ["generate", "chat"];

function show(name) {
  for (const tab of TABS) {
    const selected = tab === name;
    $(tab).hidden = !selected;
    $(`tab-${tab}`).setAttribute("aria-selected", selected);
    $(`tab-${tab}`).tabIndex = selected ? 0 : -1;
  }
}

const isShown = (name) => !$(name).hidden;

for (const tab of TABS) {
  $(`tab-${tab}`).onclick = () => show(tab);
  $(`tab-${tab}`).onkeydown = (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = TABS.find((name) => name !== tab);
    if ($(`tab-${other}`).hidden) return;
    show(other);
    $(`tab-${other}`).focus();
  };
}

// ---- Files: images to send, and the settings inside of a PNG

function readAsDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The bytes of a base64 data URL. */
function blobOf(url) {
  const [head, text] = url.split(",");
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Blob([bytes], {type: head.slice(5, head.indexOf(";"))});
}

async function bitmapOf(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The file"} is not an image that this browser can read.`);
  }
}

/** An image file as a data URL that the server reads; large and rare ones are encoded again. */
async function imageUrl(file) {
  const bitmap = await bitmapOf(file);
  const {width, height} = bitmap;
  const isSmall = Math.max(width, height) <= LONGEST_SIDE && file.size <= MOST_BYTES;
  if (isSmall && MIMES_SENT_AS_THEY_ARE.includes(file.type)) return readAsDataUrl(file);
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = make("canvas", {
    width: Math.max(1, Math.round(width * scale)),
    height: Math.max(1, Math.round(height * scale)),
  });
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // transparent pixels are white to the model too
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.95);
}

/** Texts of a PNG by keyword (chunks tEXt and uncompressed iTXt); {} for other files. */
async function pngTexts(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const texts = {};
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return texts;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = new TextDecoder("latin1").decode(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    const end = data.indexOf(0);
    const keyword = new TextDecoder("latin1").decode(data.subarray(0, end));
    if (type === "tEXt") {
      texts[keyword] = new TextDecoder("latin1").decode(data.subarray(end + 1));
    } else if (type === "iTXt" && data[end + 1] === 0) {
      const language = data.indexOf(0, end + 3);
      const translated = data.indexOf(0, language + 1);
      texts[keyword] = new TextDecoder().decode(data.subarray(translated + 1));
    }
    at += length + 12;
  }
  return texts;
}

/** The settings of an image that was generated here, or null. */
async function settingsOf(file) {
  try {
    const settings = JSON.parse((await pngTexts(file)).janusflow_jax);
    return typeof settings.prompt === "string" ? settings : null;
  } catch {
    return null;
  }
}

// ---- Generate: the form

let running = null; // the AbortController of the running generation

const compared = () => document.querySelector("input[name=compare]:checked").value;

for (const prompt of EXAMPLES) {
  const chip = make("button", {type: "button", textContent: prompt});
  chip.onclick = () => ($("prompt").value = prompt);
  $("examples").append(chip);
}

for (const radio of document.querySelectorAll("input[name=compare]")) {
  radio.onchange = () => {
    $("values-field").hidden = !compared();
    $("count").disabled = Boolean(compared());
    $("values").value = COMPARED[compared()] ?? "";
    $("values").setCustomValidity("");
  };
}

for (const id of ["previews", "strength"]) {
  $(id).oninput = () => ($(`${id}-value`).value = $(id).value);
}

$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("generate-form").requestSubmit();
  }
};

/** A first seed that leaves room for those of the other images. */
function randomSeed() {
  const [number] = crypto.getRandomValues(new Uint32Array(1));
  return Math.min(number, LAST_SEED - Number($("count").value));
}

/** The settings of the form; `seed` is the first image's. */
function settingsOfForm() {
  return {
    prompt: $("prompt").value.trim(),
    seed: Number($("seed").value),
    num_inference_steps: Number($("steps").value),
    guidance_scale: Number($("guidance").value),
    n: compared() ? 1 : Number($("count").value),
    partial_images: Number($("previews").value),
  };
}

function restore(settings, name) {
  $("prompt").value = settings.prompt;
  setValue("steps", settings.num_inference_steps);
  setValue("guidance", settings.guidance_scale);
  setValue("seed", settings.seed);
  setValue("count", settings.n ?? 1);
  $("new-seed").checked = false;
  document.querySelector("input[name=compare][value='']").click();
  show("generate");
  const notes = [`Settings of ${name} restored.`];
  const missing = ["order", "shift", "guidance_interval"].filter((key) => key in settings);
  if (missing.length) notes.push(`This page has no field for its ${missing.join(" and ")}.`);
  if ("strength" in settings) notes.push("It started from another image.");
  if (settings.model && settings.model !== modelId) notes.push(`Its model: ${settings.model}.`);
  tell("status", notes.join(" "));
}

/** The values to compare, or [] after telling the user what is wrong with them. */
function valuesToCompare() {
  const field = $(compared());
  const values = $("values").value.split(",").map((text) => Number(text.trim() || NaN));
  const isWhole = compared() === "steps";
  const bad = values.some(
    (x) => !(x >= Number(field.min) && x <= Number(field.max)) || (isWhole && x % 1),
  );
  const message = `Expected numbers from ${field.min} to ${field.max}, with commas between them`;
  $("values").setCustomValidity(bad ? message : "");
  return $("values").reportValidity() ? values : [];
}

$("values").oninput = () => $("values").setCustomValidity("");

$("generate-form").onsubmit = async (event) => {
  event.preventDefault();
  if (running) return;
  if ($("new-seed").checked) setValue("seed", randomSeed());
  const settings = settingsOfForm();
  let variants = [settings];
  if (compared()) {
    const name = compared() === "steps" ? "num_inference_steps" : "guidance_scale";
    variants = valuesToCompare().map((value) => ({...settings, [name]: value}));
    if (!variants.length) return;
  }

  running = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  tell("status", "Waiting for the server…");
  const run = new Run(variants, compared());
  run.reveal();
  const began = performance.now();
  try {
    // One after the other: a public server lets few requests of one client wait.
    for (const variant of variants) await generate(run, variant, running.signal);
    run.finish(seconds(began));
    tell("status", `Done in ${seconds(began)}.`);
  } catch (error) {
    running.abort(); // a stream that failed may still be open
    run.end(isStopped(error) ? "stopped" : "failed");
    tell("status", isStopped(error) ? "Stopped." : error.message, !isStopped(error));
  } finally {
    running = null;
    $("go").disabled = false;
    $("stop").disabled = true;
  }
};

$("stop").onclick = () => running?.abort();

async function generate(run, settings, signal) {
  const body = {...settings, stream: true};
  const path = startUrl ? "v1/images/edits" : "v1/images/generations";
  const onWait = (position) => tell("status", `Waiting: position ${position} in the queue.`);
  const sent = startUrl ? await editForm(body) : body;
  for await (const event of stream(path, sent, signal, onWait)) {
    const url = `data:image/${event.output_format ?? "png"};base64,${event.b64_json}`;
    const card = run.card(settings, event.seed);
    if (event.type.endsWith(".partial_image")) {
      card.preview(url);
      tell("status", "Generating…");
    } else if (event.type.endsWith(".completed")) {
      card.complete(url);
    }
  }
}

// ---- Generate: the gallery

const describe = (settings) =>
  `${settings.num_inference_steps} steps · guidance ${settings.guidance_scale}`;

/** The images of one press of Generate: of several seeds, or of the values that are compared. */
class Run {
  constructor(variants, name) {
    const [first] = variants;
    const seed = `seed ${first.seed}`;
    const titles = {
      guidance: (x) => `Guidance ${x.guidance_scale}`,
      steps: (x) => `${x.num_inference_steps} steps`,
      "": (x) => `Seed ${x.seed}`,
    };
    this.about = {
      guidance: `${first.num_inference_steps} steps · ${seed}`,
      steps: `guidance ${first.guidance_scale} · ${seed}`,
      "": describe(first),
    }[name];
    this.cards = new Map();
    this.grid = make("div", {className: "images"});
    this.meta = make("p", {className: "meta", textContent: this.about});
    this.stop = make("button", {type: "button", textContent: "Stop", className: "quiet"});
    this.stop.onclick = () => running?.abort();
    const title = make("h3", {textContent: first.prompt});
    const header = make("header", {}, make("div", {}, title, this.meta), this.stop);
    this.element = make("article", {className: "run"}, header, this.grid);
    for (const settings of variants) {
      for (let i = 0; i < settings.n; i++) {
        const own = {...settings, n: 1, seed: first.seed + i};
        const card = new Card(own, titles[name](own));
        this.cards.set(this.key(own, own.seed), card);
        this.grid.append(card.element);
      }
    }
    $("gallery").prepend(this.element);
    showGalleryState();
  }

  key(settings, seed) {
    return [settings.num_inference_steps, settings.guidance_scale, seed].join();
  }

  card(settings, seed) {
    const card = this.cards.get(this.key(settings, seed));
    if (!card) throw new ServerError(`The server sent an image of another seed: ${seed}.`);
    return card;
  }

  /** On a phone the gallery is below the form. */
  reveal() {
    if (matchMedia("(max-width: 52rem)").matches) this.element.scrollIntoView();
  }

  finish(duration) {
    this.meta.textContent = `${this.about} · ${duration}`;
    this.end("failed");
  }

  /** Images that never came stay as their last preview, or go. */
  end(word) {
    this.stop.remove();
    for (const card of this.cards.values()) card.end(word);
    if (!this.grid.childElementCount) this.element.remove();
    showGalleryState();
  }
}

/** One image: its previews while it is generated, then its actions. */
class Card {
  constructor(settings, title) {
    this.settings = settings;
    this.done = false;
    this.name = `${settings.prompt}, seed ${settings.seed}, ${describe(settings)}`;
    this.image = make("img", {alt: ""});
    this.frame = make("button", {type: "button", className: "frame", disabled: true}, this.image);
    this.frame.setAttribute("aria-label", `Waiting for: ${this.name}`);
    this.frame.onclick = () => view(this.image.src, this.name);
    this.progress = make("progress", {max: 1, value: 0});
    this.progress.setAttribute("aria-label", `Progress of seed ${settings.seed}`);
    this.way = make("ol", {className: "way", hidden: true});
    this.way.setAttribute("aria-label", "Where the image was heading");
    this.caption = make("figcaption", {textContent: title});
    this.element = make("figure", {className: "working"}, this.frame, this.progress);
    this.element.append(this.way, this.caption);
  }

  preview(url) {
    const number = this.way.childElementCount + 1;
    this.image.src = url;
    this.frame.setAttribute("aria-label", `Preview ${number} of: ${this.name}`);
    this.progress.value = number / (this.settings.partial_images + 1);
    this.way.append(make("li", {}, make("img", {src: url, alt: `Preview ${number}`})));
    this.way.hidden = false;
  }

  complete(url) {
    this.done = true;
    this.image.src = url;
    this.image.alt = this.name;
    this.frame.disabled = false;
    this.frame.setAttribute("aria-label", `Enlarge: ${this.name}`);
    this.progress.remove();
    this.element.className = "done";

    const save = make("a", {href: url, textContent: "Save"});
    save.download = `janusflow-${this.settings.seed}.${url.slice(11, url.indexOf(";"))}`;
    const ask = make("button", {type: "button", textContent: "Ask about it"});
    ask.onclick = () => {
      attach(url);
      show("chat");
      $("message").focus();
    };
    const vary = make("button", {type: "button", textContent: "Vary"});
    vary.onclick = () => setStart(url);
    const reuse = make("button", {type: "button", textContent: "Reuse"});
    reuse.title = "Put these settings into the form";
    reuse.onclick = () => restore(this.settings, `seed ${this.settings.seed}`);
    ask.hidden = model.understands === false;
    this.element.append(make("div", {className: "actions"}, save, ask, vary, reuse));
  }

  end(word) {
    if (this.done) return;
    if (!this.image.hasAttribute("src")) return this.element.remove();
    this.element.className = word;
    this.progress.remove();
    this.caption.textContent += ` · ${word}`;
  }
}

function showGalleryState() {
  const isEmpty = !$("gallery").childElementCount;
  $("empty").hidden = !isEmpty;
  $("clear").hidden = isEmpty;
}

$("clear").onclick = () => {
  running?.abort();
  $("gallery").replaceChildren();
  showGalleryState();
};

function view(url, text) {
  $("viewer-image").src = url;
  $("viewer-image").alt = text;
  $("viewer-text").textContent = text;
  $("viewer").showModal();
}

// ---- Generate: start from an image

let startUrl = ""; // a data URL; empty: start from noise

/** Takes an image as the start of the next ones, cropped to the square that the model sees. */
async function setStart(url) {
  const image = make("img", {src: url});
  await image.decode();
  const side = Math.min(image.naturalWidth, image.naturalHeight);
  if (image.naturalWidth !== image.naturalHeight) {
    const canvas = make("canvas", {width: side, height: side});
    const [x, y] = [(image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2];
    canvas.getContext("2d").drawImage(image, x, y, side, side, 0, 0, side, side);
    url = canvas.toDataURL("image/png");
  }
  startUrl = url;
  $("start-image").src = url;
  $("start").hidden = false;
  $("mask").width = $("mask").height = side; // which also clears it
  show("generate");
  $("strength").focus();
}

$("start-remove").onclick = () => {
  startUrl = "";
  $("start").hidden = true;
  $("use-mask").checked = false;
  $("use-mask").onchange();
};

/** The multipart form of an edit. */
async function editForm(body) {
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.append(name, value);
  form.append("strength", $("strength").value);
  form.append("image", blobOf(startUrl), "image");
  if ($("use-mask").checked) form.append("mask", await maskBlob(), "mask.png");
  return form;
}

// The mask: white strokes on black, drawn over the start image.

const pen = $("mask").getContext("2d");

function clearMask() {
  pen.clearRect(0, 0, $("mask").width, $("mask").height);
}

function maskBlob() {
  const {width, height} = $("mask");
  const canvas = make("canvas", {width, height});
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  context.drawImage($("mask"), 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

$("use-mask").onchange = () => {
  $("mask").hidden = $("mask-field").hidden = !$("use-mask").checked;
  setValue("strength", $("use-mask").checked ? 1 : 0.6); // a mask itself says what stays
};

$("mask-clear").onclick = clearMask;

$("mask-file").onchange = async () => {
  const [file] = $("mask-file").files;
  if (!file) return;
  try {
    const bitmap = await bitmapOf(file);
    const {width, height} = $("mask");
    pen.drawImage(bitmap, 0, 0, width, height);
    const pixels = pen.getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const isMarked = pixels.data[i] > 127; // white or not
      pixels.data.set([255, 255, 255, isMarked ? 255 : 0], i);
    }
    pen.putImageData(pixels, 0, 0);
  } catch (error) {
    tell("status", error.message, true);
  }
  $("mask-file").value = "";
};

function penPosition(event) {
  const box = $("mask").getBoundingClientRect();
  const scale = $("mask").width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

$("mask").onpointerdown = (event) => {
  $("mask").setPointerCapture(event.pointerId);
  pen.strokeStyle = "white";
  pen.lineWidth = $("mask").width / 10;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...penPosition(event));
  pen.lineTo(...penPosition(event));
  pen.stroke();
};

$("mask").onpointermove = (event) => {
  if (!event.buttons) return;
  pen.lineTo(...penPosition(event));
  pen.stroke();
};

// ---- Chat

let turns = []; // messages of the API so far
let pending = []; // data URLs of the next message
let answering = null; // the AbortController of the running answer

function thumbnails(urls) {
  const list = make("ul", {className: "thumbs"});
  urls.forEach((src, i) => {
    list.append(make("li", {}, make("img", {src, alt: `Image ${i + 1} of this message`})));
  });
  return list;
}

function attach(url) {
  pending.push(url);
  showPending();
}

function showPending() {
  $("pending").replaceChildren(
    ...pending.map((src, i) => {
      const remove = make("button", {type: "button", textContent: "×"});
      remove.setAttribute("aria-label", `Remove image ${i + 1}`);
      remove.onclick = () => {
        pending.splice(i, 1);
        showPending();
        $("message").focus();
      };
      return make("li", {}, make("img", {src, alt: `Image ${i + 1} of your message`}), remove);
    }),
  );
}

async function attachFiles(files) {
  tell("chat-status", "");
  for (const file of files) {
    try {
      attach(await imageUrl(file));
    } catch (error) {
      tell("chat-status", error.message, true);
    }
  }
}

const page = document.documentElement;
const isAtEnd = () => page.scrollHeight - page.scrollTop - page.clientHeight < 100;
const scrollToEnd = () => page.scrollTo({top: page.scrollHeight});

/** Adds a turn to the log and scrolls to it. */
function addTurn(role, text, images = []) {
  const words = make("p", {className: "text", textContent: text});
  const name = make("span", {className: "hidden", textContent: role === "user" ? "You:" : "Model:"});
  const turn = make("div", {className: `turn ${role}`}, name);
  if (images.length) turn.append(thumbnails(images));
  turn.append(words);
  $("log").append(turn);
  $("chat-empty").hidden = true;
  scrollToEnd();
  return {turn, words};
}

$("chat-form").onsubmit = async (event) => {
  event.preventDefault();
  const text = $("message").value.trim();
  if (answering || (!text && !pending.length)) return;
  const images = pending;
  const message = {
    role: "user",
    content: [
      ...images.map((url) => ({type: "image_url", image_url: {url}})),
      {type: "text", text},
    ],
  };
  const mine = addTurn("user", text, images);
  const answer = addTurn("assistant", "");
  answer.turn.setAttribute("aria-busy", "true");
  pending = [];
  showPending();
  $("message").value = "";
  tell("chat-status", "");

  answering = new AbortController();
  $("send").disabled = true;
  $("chat-stop").disabled = false;
  const conversation = turns;
  const result = await answerTo([...turns, message], answer, answering.signal);
  answering = null;
  $("send").disabled = false;
  $("chat-stop").disabled = true;
  answer.turn.setAttribute("aria-busy", "false");
  if (conversation !== turns) return; // a new one was begun meanwhile

  if (result.text || !result.error) {
    turns.push(message, {role: "assistant", content: result.text});
    addActions(answer, result);
  } else {
    // Nothing was answered: the message goes back where it can be changed and sent again.
    mine.turn.remove();
    answer.turn.remove();
    $("chat-empty").hidden = Boolean($("log").childElementCount);
    $("message").value = text;
    pending = images;
    showPending();
  }
  if (result.error && !isStopped(result.error)) tell("chat-status", result.error.message, true);
  $("message").focus();
};

/** Streams an answer into its turn: {text, error, tokens, finish, duration}. */
async function answerTo(messages, answer, signal) {
  const system = $("system").value.trim();
  const body = {
    messages: system ? [{role: "system", content: system}, ...messages] : messages,
    max_tokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value),
    top_p: Number($("top-p").value),
    seed: Number($("chat-seed").value),
    stream: true,
    stream_options: {include_usage: true},
  };
  const result = {text: "", error: null, tokens: 0, finish: ""};
  const began = performance.now();
  const onWait = (position) => tell("chat-status", `Waiting: position ${position} in the queue.`);
  try {
    for await (const event of stream("v1/chat/completions", body, signal, onWait)) {
      const choice = event.choices?.[0];
      result.text += choice?.delta?.content ?? "";
      result.finish = choice?.finish_reason ?? result.finish;
      result.tokens = event.usage?.completion_tokens ?? result.tokens;
      const follow = isAtEnd(); // unless the reader has scrolled up
      answer.words.textContent = result.text;
      tell("chat-status", "");
      if (follow) scrollToEnd();
    }
  } catch (error) {
    result.error = error;
  }
  result.duration = seconds(began);
  return result;
}

/** What may be done with an answer, and how long it took. */
function addActions(answer, result) {
  const notes = [result.tokens ? `${result.tokens} tokens` : "", result.duration];
  if (result.error) notes.push(isStopped(result.error) ? "stopped" : "incomplete");
  if (result.finish === "length") notes.push("cut at the longest answer");
  const meta = make("p", {className: "meta", textContent: notes.filter(Boolean).join(" · ")});
  if (!result.text) answer.words.textContent = "(an empty answer)";

  const copy = make("button", {type: "button", textContent: "Copy"});
  copy.onclick = async () => {
    await navigator.clipboard.writeText(result.text);
    tell("chat-status", "Copied.");
  };
  const use = make("button", {type: "button", textContent: "Generate from this answer"});
  use.hidden = model.generates === false || !result.text;
  use.onclick = () => {
    $("prompt").value = result.text.trim();
    show("generate");
    $("prompt").focus();
  };
  copy.hidden = !navigator.clipboard || !result.text;
  const follow = isAtEnd();
  answer.turn.append(meta, make("div", {className: "actions"}, copy, use));
  if (follow) scrollToEnd();
}

// The browser cannot show what is wrong with a field in closed settings.
$("chat-form").addEventListener("invalid", () => ($("chat-settings").open = true), true);

$("chat-stop").onclick = () => answering?.abort();

$("new").onclick = () => {
  answering?.abort();
  turns = [];
  pending = [];
  showPending();
  $("log").replaceChildren();
  $("chat-empty").hidden = false;
  tell("chat-status", "");
  $("message").focus();
};

$("message").onkeydown = (event) => {
  const isTouch = matchMedia("(pointer: coarse)").matches; // where Enter is the only new line
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch) return;
  event.preventDefault();
  $("chat-form").requestSubmit();
};

// ---- Files that are chosen, dropped or pasted

/** Files for the form in view: to ask about, to restore settings of, or to start from. */
async function receive(files) {
  if (isShown("chat")) return attachFiles(files);
  const [file] = files;
  const settings = await settingsOf(file);
  if (settings) return restore(settings, file.name);
  await startFrom(file);
}

async function startFrom(file) {
  try {
    await setStart(await imageUrl(file));
    tell("status", `The next images start from ${file.name}.`);
  } catch (error) {
    tell("status", error.message, true);
  }
}

$("attach-file").onchange = async () => {
  await attachFiles([...$("attach-file").files]);
  $("attach-file").value = "";
};

$("restore").onchange = async () => {
  const [file] = $("restore").files;
  if (!file) return;
  const settings = await settingsOf(file);
  if (settings) restore(settings, file.name);
  else tell("status", `${file.name} holds no settings of an image that was generated here.`, true);
  $("restore").value = "";
};

$("start-file").onchange = async () => {
  const [file] = $("start-file").files;
  if (file) await startFrom(file);
  $("start-file").value = "";
};

const hasFiles = (transfer) => transfer?.types.includes("Files");

document.ondragover = (event) => {
  if (!hasFiles(event.dataTransfer)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
};

document.ondragleave = (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
};

document.ondrop = async (event) => {
  if (!hasFiles(event.dataTransfer)) return;
  event.preventDefault();
  document.body.classList.remove("dropping");
  await receive([...event.dataTransfer.files]);
};

document.onpaste = async (event) => {
  if (!hasFiles(event.clipboardData)) return;
  event.preventDefault();
  await receive([...event.clipboardData.files]);
};

connect();
