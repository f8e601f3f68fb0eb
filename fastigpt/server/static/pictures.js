// What is drawn: asks the server for rows, and shows each picture while it comes and when it is there.

const ICONS = {
  download: "M12 4v11m0 0-4.5-4.5M12 15l4.5-4.5M5 19.5h14",
  again: "M19 12a7 7 0 1 1-2-4.9M19 3.5v4.2h-4.2",
};

// A request that the server refused, or that failed; the message is for people. status: of HTTP, 0 without one.
// parameter: the one that is wrong, if it is one.
export class Refused extends Error {
  constructor(message, status = 0, parameter = null) {
    super(message);
    this.status = status;
    this.parameter = parameter;
  }
}

export async function ask(path, key, options = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  throw new Refused(message, response.status, body?.error?.param);
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n");
      text = parts.pop();
      for (const part of parts) if (part) yield JSON.parse(part);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

function made(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

// The pictures of one request. title: what was asked for. again(index, seed): draws one of them once more.
export class Batch {
  constructor(results, title, again, status) {
    this.title = title;
    this.again = again;
    this.status = status;
    this.control = new AbortController();
    this.facts = made("p", { textContent: "waiting for its turn" });
    this.stop = made("button", { type: "button", textContent: "Cancel" });
    this.stop.setAttribute("aria-label", `Cancel drawing ${title}`);
    this.stop.addEventListener("click", () => this.control.abort());
    this.list = made("ul", { className: "pictures" });
    this.list.setAttribute("role", "list");
    this.failure = made("p", { className: "failure", hidden: true });
    const head = made("div", { className: "batch-head" }, made("h2", { textContent: title }), this.facts, this.stop);
    this.section = made("section", { className: "batch" }, head, this.failure, this.list);
    this.section.setAttribute("aria-label", title);
    results.prepend(this.section);
    this.pictures = [];
  }

  // Draws what the form asks for. Throws Refused if the server refuses it before anything is drawn.
  async draw(form, key) {
    const started = performance.now();
    try {
      const response = await ask("/rows", key, { method: "POST", body: form, signal: this.control.signal });
      let ended = false;
      for await (const event of lines(response)) {
        if (event.type === "start") this.#start(event);
        else if (event.type === "rows") this.#rows(event);
        else if (event.type === "image") this.#image(event);
        else if (event.type === "error") throw new Refused(event.error.message);
        else if (event.type === "end") ended = true;
      }
      if (!ended) throw new Refused("The connection was lost before everything was drawn.");
      const seconds = ((performance.now() - started) / 1000).toFixed(1);
      const count = this.pictures.length;
      this.#tell(`${this.named}, ${seconds} s`);
      this.status(`${count === 1 ? "The picture is" : `All ${count} pictures are`} drawn: ${this.title}.`);
    } catch (error) {
      this.#abandon();
      if (error.name === "AbortError") {
        this.#tell(this.pictures.length ? `${this.named}, cancelled` : "cancelled");
        this.status("Cancelled.");
        return;
      }
      if (!this.pictures.length) {
        this.section.remove();
        throw error;
      }
      this.failure.setAttribute("role", "alert");
      this.failure.hidden = false;
      this.failure.textContent = error instanceof Refused ? error.message : `Something went wrong here: ${error.message}`;
    } finally {
      const focused = document.activeElement === this.stop;
      this.stop.remove();
      if (focused) this.list.querySelector("a, button")?.focus();
    }
  }

  #start(event) {
    this.seed = event.seed;
    this.named = `${event.model}, seed ${event.seed}${event.signed ? ", signed" : ""}`;
    this.#tell(this.named);
    const count = event.indices.length;
    this.status(`Drawing ${count === 1 ? "a picture" : `${count} pictures`}: ${this.title}.`);
    this.height = event.height;
    this.width = event.width;
    this.quarter = 0;
    for (const index of event.indices) {
      const canvas = made("canvas", { width: event.width, height: event.height });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Picture ${index} of ${this.title}, being drawn`);
      const context = canvas.getContext("2d");
      if (event.kept) {
        const kept = new Uint8ClampedArray(bytes(event.kept));
        context.putImageData(new ImageData(kept, event.width, event.height), 0, 0);
      }
      const item = made("li", { className: "picture" }, canvas);
      const foot = made("div", {}, made("span", { className: "index", textContent: `No. ${index}` }));
      item.append(foot);
      this.list.append(item);
      this.pictures.push({ index, canvas, context, item, foot, rows: 0, finished: false });
    }
    this.#reveal();
  }

  // Below the form on narrow screens, so that they would be out of sight.
  #reveal() {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const below = matchMedia("(max-width: 56rem)").matches;
    this.section.scrollIntoView({ block: below ? "start" : "nearest", behavior: calm ? "auto" : "smooth" });
  }

  #rows(event) {
    const picture = this.pictures[event.image];
    const rgb = bytes(event.pixels);
    const image = picture.context.createImageData(this.width, event.rows);
    for (let i = 0; i < this.width * event.rows; i++) {
      image.data.set([rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 255], 4 * i);
    }
    picture.context.putImageData(image, 0, event.row);
    picture.rows = event.row + event.rows;
    picture.canvas.dataset.rows = picture.rows;
    const least = Math.min(...this.pictures.map((some) => some.rows));
    const quarter = Math.floor((4 * least) / this.height);
    if (quarter > this.quarter && quarter < 4) {
      this.quarter = quarter;
      this.status(`${quarter === 2 ? "Half" : `${quarter} quarter${quarter > 1 ? "s" : ""}`} of ${this.title} is drawn.`);
    }
  }

  #image(event) {
    const picture = this.pictures[event.image];
    const file = new Blob([bytes(event.b64_json)], { type: "image/png" });
    const url = URL.createObjectURL(file);
    const alt = `Picture ${event.index}: ${this.title}, seed ${this.seed}`;
    const image = made("img", { src: url, alt, width: this.width, height: this.height });
    image.decode().then(() => picture.canvas.replaceWith(image));
    const name = `fastigpt-${this.seed}-${event.index}.png`;
    const download = made("a", { href: url, download: name, title: "Download" }, icon("download"));
    download.setAttribute("aria-label", `Download picture ${event.index}`);
    const again = made("button", { type: "button", title: "Draw this one again" }, icon("again"));
    again.setAttribute("aria-label", `Draw picture ${event.index} again`);
    again.addEventListener("click", () => this.again(event.index, this.seed));
    picture.foot.append(download, again);
    picture.finished = true;
  }

  #abandon() {
    for (const picture of this.pictures) {
      if (picture.finished) continue;
      picture.canvas.setAttribute("aria-label", `Picture ${picture.index} of ${this.title}, not finished`);
    }
  }

  #tell(text) {
    this.facts.textContent = text;
  }
}
