// The mask over a photo: cells of the model's canvas that are drawn anew, painted by pointer, keyboard or numbers.

const SIDE = 768; // pixels of the canvas it is painted on, its longer side

const EDGE = 3; // pixels of the line around what is marked

export class Mask {
  // element: a canvas. state: where it is told how much is marked. changed: called whenever that changes.
  constructor(element, state, changed) {
    this.element = element;
    this.state = state;
    this.changed = changed;
    this.brush = 4;
    this.erasing = false;
    this.photo = null;
    this.cursor = { row: 0, column: 0 };
    this.pointer = null;
    this.resize(1, 1);
    element.addEventListener("pointerdown", (event) => this.#press(event));
    element.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      element.addEventListener(name, () => this.#release());
    }
    element.addEventListener("keydown", (event) => this.#key(event));
    for (const name of ["focus", "blur"]) element.addEventListener(name, () => this.#draw());
  }

  // The model's canvas has so many cells.
  resize(rows, columns) {
    this.rows = rows;
    this.columns = columns;
    this.cells = new Uint8Array(rows * columns);
    this.scale = Math.max(1, Math.floor(SIDE / Math.max(rows, columns)));
    this.element.width = columns * this.scale;
    this.element.height = rows * this.scale;
    this.cursor = { row: rows >> 1, column: columns >> 1 };
    this.#told();
  }

  show(photo) {
    this.photo = photo;
    this.clear();
  }

  get marked() {
    return this.cells.reduce((sum, cell) => sum + cell, 0);
  }

  clear() {
    this.cells.fill(0);
    this.#told();
  }

  // Marks (1) or unmarks (0) a rectangle of cells, as much of it as there is.
  rectangle(top, left, height, width, value) {
    for (let row = Math.max(0, top); row < Math.min(this.rows, top + height); row++) {
      for (let column = Math.max(0, left); column < Math.min(this.columns, left + width); column++) {
        this.cells[row * this.columns + column] = value;
      }
    }
    this.#told();
  }

  // A PNG as the Images API has it: transparent where the picture is drawn anew.
  async png() {
    const canvas = new OffscreenCanvas(this.columns, this.rows);
    const context = canvas.getContext("2d");
    const image = context.createImageData(this.columns, this.rows);
    this.cells.forEach((cell, i) => image.data.set([0, 0, 0, cell ? 0 : 255], 4 * i));
    context.putImageData(image, 0, 0);
    return canvas.convertToBlob({ type: "image/png" });
  }

  #paint(row, column, value = this.erasing ? 0 : 1) {
    const before = Math.floor((this.brush - 1) / 2);
    this.rectangle(row - before, column - before, this.brush, this.brush, value);
  }

  #cell(event) {
    const box = this.element.getBoundingClientRect();
    return {
      row: Math.floor(((event.clientY - box.top) / box.height) * this.rows),
      column: Math.floor(((event.clientX - box.left) / box.width) * this.columns),
    };
  }

  #press(event) {
    this.element.setPointerCapture(event.pointerId);
    this.pointer = this.cursor = this.#cell(event);
    this.#paint(this.pointer.row, this.pointer.column);
  }

  #move(event) {
    if (!this.pointer) return;
    const from = this.pointer;
    const to = this.#cell(event);
    const steps = Math.max(1, Math.abs(to.row - from.row), Math.abs(to.column - from.column));
    for (let i = 1; i <= steps; i++) {
      const at = (a, b) => Math.round(a + ((b - a) * i) / steps);
      this.#paint(at(from.row, to.row), at(from.column, to.column));
    }
    this.pointer = this.cursor = to;
  }

  #release() {
    this.pointer = null;
  }

  #key(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (move) {
      const within = (value, count) => Math.min(count - 1, Math.max(0, value));
      this.cursor = {
        row: within(this.cursor.row + move[0], this.rows),
        column: within(this.cursor.column + move[1], this.columns),
      };
      if (event.shiftKey) this.#paint(this.cursor.row, this.cursor.column);
      else this.#told();
    } else if (event.key === " ") {
      this.#paint(this.cursor.row, this.cursor.column);
    } else if (event.key.toLowerCase() === "x") {
      this.#paint(this.cursor.row, this.cursor.column, 0);
    } else {
      return;
    }
    event.preventDefault();
  }

  #told() {
    this.#draw();
    const place = `row ${this.cursor.row + 1}, column ${this.cursor.column + 1}`;
    const marked = this.marked;
    const how = marked ? `${marked} of ${this.cells.length} cells are drawn anew` : "nothing is marked yet";
    this.state.textContent = document.activeElement === this.element && !this.pointer ? `${place}: ${how}.` : `${how[0].toUpperCase()}${how.slice(1)}.`;
    this.changed();
  }

  #draw() {
    const context = this.element.getContext("2d");
    const { width, height } = this.element;
    context.clearRect(0, 0, width, height);
    if (this.photo) {
      // About what the model sees: as many cells as it has.
      const small = new OffscreenCanvas(this.columns, this.rows);
      const reduced = small.getContext("2d");
      reduced.imageSmoothingQuality = "high";
      reduced.drawImage(this.photo, 0, 0, this.columns, this.rows);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, 0, 0, width, height);
    }
    const color = getComputedStyle(this.element).getPropertyValue("--mark");
    this.cells.forEach((cell, i) => {
      if (!cell) return;
      const x = (i % this.columns) * this.scale;
      const y = Math.floor(i / this.columns) * this.scale;
      context.fillStyle = `rgb(${color} / .78)`;
      context.fillRect(x, y, this.scale, this.scale);
      // A white line where it ends, on whatever photo.
      const open = (row, column) => !this.cells[row * this.columns + column] || column < 0 || column >= this.columns;
      const row = Math.floor(i / this.columns);
      const column = i % this.columns;
      context.fillStyle = "#fff";
      if (open(row - 1, column)) context.fillRect(x, y, this.scale, EDGE);
      if (open(row + 1, column)) context.fillRect(x, y + this.scale - EDGE, this.scale, EDGE);
      if (open(row, column - 1)) context.fillRect(x, y, EDGE, this.scale);
      if (open(row, column + 1)) context.fillRect(x + this.scale - EDGE, y, EDGE, this.scale);
    });
    if (document.activeElement === this.element) {
      const before = Math.floor((this.brush - 1) / 2);
      const box = [this.cursor.column - before, this.cursor.row - before, this.brush, this.brush];
      for (const [line, style] of [[6, "#000"], [3, "#fff"]]) {
        context.lineWidth = line;
        context.strokeStyle = style;
        context.strokeRect(...box.map((value) => value * this.scale));
      }
      context.lineWidth = 1;
    }
  }
}
