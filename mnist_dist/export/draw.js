const paper = element("paper"), larger = Math.max(WIDTH, HEIGHT);
paper.width = Math.round(420 * WIDTH / larger);
paper.height = Math.round(420 * HEIGHT / larger);
const pen = paper.getContext("2d", {willReadFrequently: true});
pen.lineCap = pen.lineJoin = "round";
pen.lineWidth = 420 / 13;

const digits = classes.every(name => /^\d$/.test(name)), waiting = "the prediction appears while you draw";
element("title").textContent = digits ? "Draw a digit" : `Draw one of ${classes.length} classes`;
paper.setAttribute("aria-label", `Drawing area for one of: ${listed}`);

// --- from the drawing to an image like the training set's: the steps of mnist_dist.predict, with equal grey levels ---

const FAINT = 0.2;
const sinc = x => x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1;
const lanczos = x => Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0;

/** Resizes rows of grey levels along x and returns the transposed rows; two calls resize an image. */
function resizeAlongX(rows, size) {
  return weightsOf(rows[0].length, size, lanczos, 3).map(({first, weights}) => Uint8ClampedArray.from(rows, row =>
    weights.reduce((total, weight, step) => total + weight * row[first + step], 0)));
}

const transposed = rows => Array.from(rows[0], (_, x) => Uint8ClampedArray.from(rows, row => row[x]));

/** Returns the drawing as grey levels, as the training set's images are; null if the paper is empty. */
function prepare() {
  const {width, height} = paper;
  const pixels = pen.getImageData(0, 0, width, height).data;
  const ink = (x, y) => pixels[4 * (y * width + x) + 3];  // the pen is black on a transparent canvas: the opacity is the ink
  let strongest = 0;
  for (let index = 3; index < pixels.length; index += 4) strongest = Math.max(strongest, pixels[index]);
  if (strongest < 16) return null;
  let left = width, right = -1, top = height, bottom = -1;
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) if (ink(x, y) / strongest > FAINT) {
    left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = y;
  }
  const columns = right - left + 1, lines = bottom - top + 1;
  const scale = Math.min(geometry.figure / Math.max(columns, lines), HEIGHT / lines, WIDTH / columns);
  const figure = Array.from({length: lines}, (_, y) => Uint8ClampedArray.from({length: columns}, (_, x) =>
    Math.trunc(Math.fround(255 * Math.fround(ink(left + x, top + y) / strongest)))));
  const [across, down] = [columns, lines].map(length => Math.max(1, round(length * scale)));
  const small = lines > 2 * columns  // Pillow resizes the height of tall pictures first; the order changes the rounding
    ? transposed(resizeAlongX(resizeAlongX(transposed(figure), down), across))
    : resizeAlongX(resizeAlongX(figure, across), down);
  let mass = 0, centreX = 0, centreY = 0;
  small.forEach((row, y) => row.forEach((value, x) => { mass += value; centreX += value * x; centreY += value * y; }));
  const [shiftX, shiftY] = [[centreX, across, WIDTH], [centreY, down, HEIGHT]].map(([moment, size, side]) => {
    const centre = geometry.centre === "mass" ? moment / mass : (size - 1) / 2;
    return Math.min(Math.max(round((side - 1) / 2 - centre), 0), side - size);
  });
  const image = new Uint8Array(WIDTH * HEIGHT);
  small.forEach((row, y) => image.set(row, (shiftY + y) * WIDTH + shiftX));
  return geometry.ground === "light" ? image.map(value => 255 - value) : image;
}

// --- the pen ---

let last = null;  // the position of the pen while it is down
const unfinished = () => last !== null;

function draw(event) {
  const frame = paper.getBoundingClientRect();
  const moves = event.getCoalescedEvents?.() ?? [];
  for (const {clientX, clientY} of moves.length ? moves : [event]) {
    const here = [(clientX - frame.left) * paper.width / frame.width, (clientY - frame.top) * paper.height / frame.height];
    pen.beginPath();
    pen.moveTo(...(last ?? here));
    pen.lineTo(...here);
    pen.stroke();
    last = here;
  }
  update();
}

paper.addEventListener("pointerdown", event => {
  if (!event.isPrimary || event.button !== 0) return;
  event.preventDefault();
  paper.setPointerCapture(event.pointerId);
  element("hint").style.display = "none";
  draw(event);
});
paper.addEventListener("pointermove", event => { if (last && event.isPrimary) draw(event); });
for (const end of ["pointerup", "pointercancel"])
  paper.addEventListener(end, event => { if (event.isPrimary) { last = null; update(); } });
element("clear").addEventListener("click", () => {
  pen.clearRect(0, 0, paper.width, paper.height);
  element("hint").style.display = "";
  update();
});
